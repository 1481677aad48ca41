# SPDX-License-Identifier: Apache-2.0
"""LitServe with batching as its documentation has it: ``max_batch_size`` and ``batch_timeout``, one worker."""

import os
from typing import Any

import litserve

from benchmarks.serving.behind import BATCH_REQUESTS, BATCH_SECONDS, PORT, Asked, of_environment


class Scorer(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.scores = of_environment()

    def decode_request(self, request: dict[str, Any]) -> Asked:
        return Asked.of(request)

    def batch(self, inputs: list[Asked]) -> list[Asked]:
        return list(inputs)

    def predict(self, inputs: list[Asked]) -> list[list[float]]:
        return self.scores(inputs)

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        return output

    def encode_response(self, output: list[float]) -> dict[str, list[float]]:
        return {"scores": output}


if __name__ == "__main__":
    api = Scorer(max_batch_size=BATCH_REQUESTS, batch_timeout=BATCH_SECONDS)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(os.environ[PORT]), num_api_servers=1, generate_client_file=False, log_level="warning")
