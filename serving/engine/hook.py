# SPDX-License-Identifier: Apache-2.0
"""Telling somebody of every answer, on a thread of its own: who is told may be slow, or fail, and no request waits for it."""

import logging
import queue
import threading
from collections.abc import Callable

from serving.engine.work import Served

log = logging.getLogger("serving")

OnAnswer = Callable[[Served], None]


class Hook:
    """Calls ``told`` with one trace after another.

    Args:
        told: whom to tell.
        dropped: called for each trace that finds no room.
        capacity: how many traces may wait.
    """

    def __init__(self, told: OnAnswer, dropped: Callable[[], None], capacity: int = 1000) -> None:
        self._told, self._dropped = told, dropped
        self._waiting: queue.Queue[Served | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._tell, name="answers", daemon=True)
        self._thread.start()

    def offer(self, served: Served) -> None:
        """Take a trace; returns at once."""
        try:
            self._waiting.put_nowait(served)
        except queue.Full:
            self._dropped()

    def close(self, seconds: float = 5.0) -> None:
        """Tell what waits, for so long at most."""
        try:
            self._waiting.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)

    def _tell(self) -> None:
        while self._tell_one():
            continue

    def _tell_one(self) -> bool:
        """False at the end. A trace, and the bundle that it names, is held no longer than it is told."""
        served = self._waiting.get()
        if served is None:
            return False
        try:
            self._told(served)
        except Exception:
            log.exception("the hook of answers failed for request %s", served.request_id)
        return True
