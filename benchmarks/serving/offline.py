# SPDX-License-Identifier: Apache-2.0
"""The same work without a server, on the server's core: ``offline.py CORE HOME``. Rows a second by the number of requests of a batch."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.serving import behind
from benchmarks.serving.behind import CHAMPION, Asked
from benchmarks.worker import serve
from recsys.inference.recommender import Candidates, Recommender
from recsys.registry import Location
from serving.engine import Hosting, RegistrySource


class Offline:
    """Answers ``prepare`` (loads; compiles where that has not been done) and ``rates``."""

    def __init__(self, home: Path) -> None:
        torch.set_num_threads(1)
        source = RegistrySource(CHAMPION, Location.under(home), Hosting(mmap=True, compile=True))
        self._recommender = source.load(source.target()).recommender

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        match request["do"]:
            case "prepare":
                return {"ranker": type(self._recommender.ranker).__name__}
            case "rates":
                asked = [Asked.of(body) for body in request["bodies"]]
                return {str(size): self._rates(asked[:size], request["seconds"]) for size in request["sizes"]}
            case other:
                raise ValueError(f"unknown request {other!r}")

    def _rates(self, asked: list[Asked], seconds: float) -> dict[str, float]:
        """Rows a second: of the whole path, and of the ranker alone."""
        recommender, count = self._recommender, sum(len(one.item_ids) for one in asked)
        batch = _batch(recommender, asked)

        def predict() -> None:
            with torch.inference_mode():
                recommender.ranker.predict(batch)

        return {
            "path": _rate(lambda: behind.same(recommender, asked), count, seconds),
            "ranker": _rate(predict, count, seconds),
        }


def _batch(recommender: Recommender, asked: list[Asked]) -> Any:
    users = recommender.users([one.user_id for one in asked], behind.now(len(asked)))
    rows = np.stack([recommender.view.rows(list(one.item_ids)) for one in asked])
    candidates = Candidates(rows, np.zeros(rows.shape, np.float32))
    return recommender.batch(users, candidates, recommender.items(users, candidates))


def _rate(call: Callable[[], Any], rows: int, seconds: float) -> float:
    call()
    began, calls = time.perf_counter(), 0
    while (taken := time.perf_counter() - began) < seconds:
        call()
        calls += 1
    return calls * rows / taken


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[1])})
    serve(Offline(Path(sys.argv[2])).handle)
