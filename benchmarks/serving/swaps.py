# SPDX-License-Identifier: Apache-2.0
"""Hot swaps under load: bundles are promoted one after another while requests come, and each is awaited until it answers."""

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.clients import GIVE_UP_SECONDS, Clients
from benchmarks.serving.figures import ANSWERED
from benchmarks.serving.prepared import move
from benchmarks.serving.servers import Running, request
from recsys.registry import Location, Registry

SETTLED_AFTER = 10
"""Swaps after which memory is looked at first; half of them where there are fewer than twice as many."""
_ROUND_SECONDS = 10.0
_SWAP_SECONDS = 120.0


@dataclass
class Swaps:
    """What came of swaps.

    Attributes:
        swaps: how many there were.
        seconds: of each, from the promotion to when the bundle answers.
        resident: bytes of the server's memory after each.
        status: of HTTP, of every request from the first promotion on.
        latency: seconds, likewise.
        lesser: whether the answer was one without the ranker, likewise.
        steady: seconds, of requests at the same rate before.
    """

    swaps: int
    seconds: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    lesser: list[bool] = field(default_factory=list)
    steady: list[float] = field(default_factory=list)

    @property
    def failures(self) -> int:
        """Requests that were not answered with status 200."""
        return sum(status != ANSWERED for status in self.status)

    @property
    def p99_over_steady(self) -> float:
        """The 99th percentile of answers while bundles were swapped over that before; where there are none, clients gave up."""
        found = np.asarray(self.latency)[np.asarray(self.status) == ANSWERED]
        if len(found) == 0:
            return GIVE_UP_SECONDS / float(np.percentile(self.steady, 99))
        return float(np.percentile(found, 99) / np.percentile(self.steady, 99))

    @property
    def growth(self) -> float:
        """Memory after the last swap over that after `SETTLED_AFTER`."""
        return self.resident[-1] / self.resident[min(SETTLED_AFTER, len(self.resident) // 2) - 1]


def swaps(server: Running, row: str, clients: Clients, home: Path, rate: float, count: int, deadline_ms: int, seconds: float) -> Swaps:
    """Swap so often under a load of ``rate`` requests a second.

    Args:
        server: ours.
        row: of the contest.
        clients: send the load.
        home: the folder of the registry.
        rate: requests a second.
        count: of swaps.
        deadline_ms: of requests.
        seconds: of steady load before.

    Raises:
        RuntimeError: a bundle did not go live in two minutes, or no request was answered before.
    """
    before = clients.open(server, row, deadline_ms, rate, max(seconds, _ROUND_SECONDS), seed=0)
    found = Swaps(count, steady=[t for t, status in zip(before["latency"], before["status"], strict=True) if status == ANSWERED])
    if not found.steady:
        raise RuntimeError("no request was answered before the first swap")
    mover = _Mover(server, Registry(Location.under(home)), found)
    mover.start()
    try:
        seed = 1
        while mover.is_alive():
            outcomes = clients.open(server, row, deadline_ms, rate, _ROUND_SECONDS, seed=seed)
            _take(found, outcomes, mover)
            seed += 1
    finally:
        mover.stop()
    if mover.error is not None:
        raise RuntimeError(f"after {len(found.seconds)} of {count} swaps: {mover.error}")
    return found


class _Mover(threading.Thread):
    """Promotes, and waits until it answers; again and again."""

    def __init__(self, server: Running, registry: Registry, found: Swaps) -> None:
        super().__init__(name="mover", daemon=True)
        self._server, self._registry, self._found = server, registry, found
        self._stopped = threading.Event()
        self.ended = float("inf")
        self.error: Exception | None = None

    def run(self) -> None:
        """See `threading.Thread`."""
        try:
            while len(self._found.seconds) < self._found.swaps and not self._stopped.is_set():
                self._move()
        except Exception as error:
            self.error = error
        self.ended = time.monotonic()

    def stop(self) -> None:
        """End after the swap that is under way."""
        self._stopped.set()
        self.join(_SWAP_SECONDS)

    def _move(self) -> None:
        began, version = time.monotonic(), move(self._registry)
        while self._live() != version:
            if time.monotonic() - began > _SWAP_SECONDS:
                raise RuntimeError(f"version {version} was promoted, and did not answer within {_SWAP_SECONDS:.0f} s")
            time.sleep(0.05)
        self._found.seconds.append(time.monotonic() - began)
        self._found.resident.append(self._server.resident())

    def _live(self) -> Any:
        with suppress(OSError):
            status, content = request(self._server.port, "GET", "/readyz")
            return json.loads(content)["version"] if status == ANSWERED else None
        return None


def _take(found: Swaps, outcomes: dict[str, Any], mover: _Mover) -> None:
    """Add a round's requests, but for those that were due after the last swap."""
    for at, latency, status, lesser in zip(*(outcomes[name] for name in ("due", "latency", "status", "lesser")), strict=True):
        if outcomes["began"] + at <= mover.ended:
            found.latency.append(latency)
            found.status.append(status)
            found.lesser.append(lesser)
