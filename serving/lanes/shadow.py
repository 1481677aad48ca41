# SPDX-License-Identifier: Apache-2.0
"""A bundle that answers what the champion has answered, on a thread of its own, and whose answers nobody sees but who compares them."""

import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from recsys.inference.request import Response
from serving.engine.hook import Hook
from serving.engine.threads import Repeating
from serving.engine.work import Served
from serving.lanes.lane import Lane
from serving.metrics import Metrics

LIST = 10


@dataclass(frozen=True)
class Report:
    """How a shadow's lists compare with those that were given; means over the requests.

    Attributes:
        compared: requests that both have answered.
        dropped: requests that found no room in the queue.
        failed: requests that the shadow could not answer.
        overlap: share of the first `LIST` items that the shadow's first ones hold.
        drift: by how much the shadow's score is above the given one, over the items of both.
        seconds: that the shadow took, alone.
        primary_seconds: that the stages of the given answer took, in a batch.
    """

    compared: int
    dropped: int
    failed: int
    overlap: float | None
    drift: float | None
    seconds: float | None
    primary_seconds: float | None


class Shadow:
    """See the module. Called with every answer, it returns at once.

    Args:
        lane: follows the log's shadow.
        capacity: requests that may wait; more are dropped, and counted.
        poll_seconds: between two looks into the log.
    """

    def __init__(self, lane: Lane, capacity: int = 100, poll_seconds: float = 1.0) -> None:
        self.lane = lane
        self._lock = threading.Lock()
        self._version: int | None = None
        self._counts: dict[str, float] = {}
        self._metrics: Metrics | None = None
        self._hook = Hook(self._answer, self._drop, capacity)
        self._thread = Repeating(self._look, poll_seconds, "shadow")

    def start(self, metrics: Metrics | None = None) -> None:
        """Begin to follow the log, and to count in these metrics."""
        self._metrics = metrics
        self._thread.start()

    def close(self) -> None:
        """Follow the log no more; what waits is compared, for a few seconds at most."""
        self._thread.stop()
        self._hook.close()

    def __call__(self, served: Served) -> None:
        """Take a copy of a request that was answered with a ranked list."""
        if self.lane.now is not None and served.ranked is not None and not served.given:
            self._hook.offer(served)

    def report(self) -> dict[str, Any]:
        """What was found of the present shadow (`Report`), with its version; None for what nothing is known of."""
        now = self.lane.now
        with self._lock:
            counts = dict(self._counts)
        compared = int(counts.get("compared", 0))

        def mean(name: str, of: float) -> float | None:
            return counts.get(name, 0.0) / of if of else None

        report = Report(
            compared=compared,
            dropped=int(counts.get("dropped", 0)),
            failed=int(counts.get("failed", 0)),
            overlap=mean("overlap", compared),
            drift=mean("drift", counts.get("common", 0)),
            seconds=mean("seconds", compared),
            primary_seconds=mean("primary_seconds", compared),
        )
        return {"version": None if now is None else now[1].version, "problem": self.lane.problem, **asdict(report)}

    def _answer(self, served: Served) -> None:
        now = self.lane.now
        if now is None:
            return
        self._start_over(now[1].version)
        began = time.monotonic()
        try:
            (response,) = now[1].recommender.recommend([served.request])
        except Exception:
            self._count("failed", failed=1)
            raise
        seconds = time.monotonic() - began
        primary = sum(took for stage, took in served.stages.items() if stage != "queue")
        found = _compared(served.response, response)
        self._count("compared", compared=1, seconds=seconds, primary_seconds=primary, **found)
        if self._metrics is not None:
            self._metrics.overlap.observe(found["overlap"])

    def _look(self) -> None:
        self.lane.follow()
        self.lane.renew()

    def _drop(self) -> None:
        self._count("dropped", dropped=1)

    def _start_over(self, version: int) -> None:
        """Count anew for another bundle."""
        with self._lock:
            if self._version not in (None, version):
                self._counts = {}
            self._version = version

    def _count(self, outcome: str, **more: float) -> None:
        if self._metrics is not None:
            self._metrics.shadow.labels(outcome).inc()
        with self._lock:
            for name, value in more.items():
                self._counts[name] = self._counts.get(name, 0.0) + value


def _compared(given: Response, own: Response) -> dict[str, float]:
    first = {item.item_id: item.score for item in given.items[:LIST]}
    second = {item.item_id: item.score for item in own.items[:LIST]}
    common = first.keys() & second.keys()
    return {
        "overlap": len(common) / len(first) if first else 1.0,
        "common": len(common),
        "drift": sum(second[item] - first[item] for item in common),
    }
