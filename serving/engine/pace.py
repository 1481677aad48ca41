# SPDX-License-Identifier: Apache-2.0
"""How long a batch will take, and how much will come meanwhile, learned from what was before."""

import math

_LEAST_SECONDS = 1e-6


class Pace:
    """Seconds of a batch as ``a + b · rows``, by least squares with exponentially falling weights.

    A mean of rows a second alone would take the overhead of the small batches of a quiet time for the price of a row, and reject a burst
    that one full batch could answer.

    Args:
        decay: by which the weight of what was seen falls with each further batch.
    """

    def __init__(self, decay: float = 0.95) -> None:
        self._decay = decay
        self._weight = self._rows = self._seconds = self._rows_squared = self._product = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Take in a batch."""
        for name, value in (("_weight", 1.0), ("_rows", rows), ("_seconds", seconds), ("_rows_squared", rows * rows)):
            setattr(self, name, self._decay * getattr(self, name) + value)
        self._product = self._decay * self._product + rows * seconds

    def seconds(self, rows: int) -> float:
        """How long a batch of ``rows`` will take; 0 before anything was observed."""
        if self._weight == 0 or rows <= 0:
            return 0.0
        overhead, row = self._line()
        return overhead + row * rows

    def _line(self) -> tuple[float, float]:
        """a and b, neither negative."""
        rows, seconds = self._rows / self._weight, max(self._seconds / self._weight, _LEAST_SECONDS)
        spread = self._rows_squared / self._weight - rows * rows
        ratio = seconds / rows if rows else 0.0
        # Batches of nearly one size tell no overhead from a row's price.
        if spread <= 1e-3 * rows * rows:
            return 0.0, ratio
        row = min(max((self._product / self._weight - rows * seconds) / spread, 0.0), ratio)
        return seconds - row * rows, row


class Arrivals:
    """Rows a second that come, with exponentially falling weights.

    Args:
        memory: seconds in which the weight of what came falls to 1/e.
    """

    def __init__(self, memory: float = 0.25) -> None:
        self._memory = memory
        self._rows = self._at = 0.0

    def add(self, rows: int, now: float) -> None:
        """Rows came."""
        self._rows, self._at = self._left(now) + rows, now

    def rate(self, now: float) -> float:
        """Rows a second."""
        return self._left(now) / self._memory

    def _left(self, now: float) -> float:
        return self._rows * math.exp(min(0.0, self._at - now) / self._memory)
