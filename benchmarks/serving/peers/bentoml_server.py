# SPDX-License-Identifier: Apache-2.0
"""BentoML with adaptive batching as its documentation has it: ``batchable=True``, one worker."""

from typing import Any

import bentoml

from benchmarks.serving.behind import BATCH_REQUESTS, Asked, of_environment

MOST_LATENCY_MS = 100


@bentoml.service(workers=1)
class Scorer:
    def __init__(self) -> None:
        self.scores = of_environment()

    @bentoml.api(batchable=True, max_batch_size=BATCH_REQUESTS, max_latency_ms=MOST_LATENCY_MS)
    def predict(self, asked: list[dict[str, Any]]) -> list[list[float]]:
        return self.scores([Asked.of(one) for one in asked])
