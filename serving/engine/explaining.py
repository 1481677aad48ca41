# SPDX-License-Identifier: Apache-2.0
"""Reasons, on a thread of their own: they cost more than the list that they explain, and no other request waits for them."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from serving.engine.entry import Entry

_WEIGHT = 0.2


@dataclass(frozen=True)
class Explanation:
    """One list to explain.

    Attributes:
        entry: whose list it is.
        explained: computes the answer with its reasons, and resolves the entry.
        plain: resolves the entry without them.
    """

    entry: Entry
    explained: Callable[[], None]
    plain: Callable[[], None]


class Explainer:
    """Explains lists, the most urgent first. A list that cannot be explained in time is answered without its reasons.

    Args:
        capacity: how many lists may wait.
    """

    def __init__(self, capacity: int = 256) -> None:
        self._capacity = capacity
        self._waiting: list[tuple[float, int, Explanation]] = []
        self._number = itertools.count()
        self._seconds = 0.0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="explain", daemon=True)
        self._thread.start()

    def offer(self, explanation: Explanation) -> None:
        """Let a list wait for its reasons."""
        with self._changed:
            if not self._closed and len(self._waiting) < self._capacity:
                heapq.heappush(self._waiting, (explanation.entry.cutoff, next(self._number), explanation))
                self._changed.notify()
                return
        explanation.plain()

    def close(self, seconds: float = 5.0) -> None:
        """Answer what waits, for so long at most, and take no more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        while self._explain_one():
            continue

    def _explain_one(self) -> bool:
        """False at the end. A list, and the bundle that made it, is held no longer than it is explained."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._waiting))
            if not self._waiting:
                return False
            cutoff, _, explanation = heapq.heappop(self._waiting)
        if explanation.entry.gone:
            return True
        began = time.monotonic()
        if began + self._seconds > cutoff:
            explanation.plain()
            # What took long once is tried again some time.
            self._seconds *= 1 - _WEIGHT / 4
            return True
        explanation.explained()
        self._seconds += _WEIGHT * (time.monotonic() - began - self._seconds)
        return True
