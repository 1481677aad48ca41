# SPDX-License-Identifier: Apache-2.0
"""A circuit breaker: what failed often in a row is left alone for a while, so that no request waits for it."""

import threading
import time
from collections.abc import Callable


class Breaker:
    """Closed: everything is tried. Open: nothing is. After ``seconds`` one attempt is let through, and decides.

    Args:
        failures: in a row, after which it opens.
        seconds: how long it stays open before an attempt.
        clock: monotonic seconds.
    """

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._failures, self._seconds, self._clock = failures, seconds, clock
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._closed_again: float | None = None

    @property
    def open(self) -> bool:
        """Whether it opened, and no attempt has succeeded since."""
        return self._closed_again is not None

    @property
    def due(self) -> bool:
        """Whether it is open, and it is time for an attempt."""
        return self._closed_again is not None and self._clock() >= self._closed_again

    def allow(self) -> bool:
        """Whether to try now. Where it was time for an attempt, the caller makes it: others wait for its outcome, or for another while."""
        with self._lock:
            if self._closed_again is None:
                return True
            if self._clock() < self._closed_again:
                return False
            self._closed_again = self._clock() + self._seconds
            return True

    def succeeded(self) -> None:
        """An attempt succeeded: closed."""
        with self._lock:
            self._in_a_row, self._closed_again = 0, None

    def failed(self) -> None:
        """An attempt failed."""
        with self._lock:
            self._in_a_row += 1
            if self._closed_again is not None or self._in_a_row >= self._failures:
                self._closed_again = self._clock() + self._seconds
