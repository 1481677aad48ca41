# SPDX-License-Identifier: Apache-2.0
"""Vectorised work on many ranges of one array: bisection, sums, expansion, running extremes, and the order that makes them."""

from collections.abc import Iterator

import numpy as np

NEVER = np.iinfo(np.int64).min
"""A time before every other: that of a static row."""


def bisect_right(values: np.ndarray, wanted: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """For each row r: how far ``values[start[r]:stop[r]]``, which ascends, stays at or below ``wanted[r]``.

    Args:
        values: int64 ``[N]``.
        wanted: int64 ``[R]``.
        start: int64 ``[R]``.
        stop: int64 ``[R]``.

    Returns:
        int64 ``[R]``: positions from ``start`` to ``stop``.
    """
    low, high = start.copy(), stop.copy()
    while (open_ := low < high).any():
        middle = (low + high) >> 1
        # A closed range may lie past the end; what is read there is not used.
        below = values[np.minimum(middle, len(values) - 1)] <= wanted
        low = np.where(open_ & below, middle + 1, low)
        high = np.where(open_ & ~below, middle, high)
    return low


def expand(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """int64: the positions ``start[r], …, start[r] + length[r] - 1`` of all rows, one after another."""
    before = np.cumsum(length) - length
    positions = np.repeat(start - before, length)
    positions += np.arange(len(positions))
    return positions


def order_by(*columns: np.ndarray) -> np.ndarray:
    """int64 ``[N]``: the positions in ascending order by the columns, the first before the others; equal ones in their order.

    What `np.lexsort` gives, by radix: each pass sorts 16 bits, which NumPy does in linear time.

    Args:
        columns: int64 ``[N]`` each.
    """
    order = np.arange(len(columns[0]))
    for place, values in enumerate(reversed(columns)):
        if place == 0 and (values[1:] >= values[:-1]).all():
            continue
        rest = values.astype(np.uint64) - values.min(initial=np.iinfo(np.int64).max).astype(
            np.uint64
        )  # wraps, so that no range is too wide
        for shift in range(0, int(rest.max(initial=0)).bit_length(), 16):
            digit = (rest >> np.uint64(shift)).astype(np.uint16)
            order = order[np.argsort(digit[order], kind="stable")]
    return order


def reduce_ranges(operation: np.ufunc, padded: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """``[R]``: what ``operation`` makes of ``padded[start[r]:stop[r]]``, and the last element where there is nothing.

    Args:
        operation: of two values, such as `np.add`.
        padded: ``[N + 1]``, N values and what stands for none.
        start: int64 ``[R]``, at most N.
        stop: int64 ``[R]``, at most N.
    """
    # reduceat works between consecutive bounds. With descending starts, what it visits between two ranges is a single value.
    order = np.argsort(-start, kind="stable")
    bounds = np.empty(2 * len(order), np.int64)
    bounds[0::2], bounds[1::2] = start[order], stop[order]
    reduced = np.empty(len(order), padded.dtype)
    reduced[order] = operation.reduceat(padded, bounds)[0::2]
    return np.where(start < stop, reduced, padded[-1])


class RangeSums:
    """Sums over ranges of float64 values that do not depend on what stands outside the range.

    A difference of running sums would round differently in a log that begins earlier, and cancel where a large value precedes. So the
    ranges are summed one by one, unless running sums are exact: all values multiples of 1/1024 (such as ratings and counts) whose
    absolute sum stays below 2**43.

    Args:
        values: float64 ``[N]``.

    Attributes:
        exact: whether running sums are, so that sums of two adjoining ranges add up to that of both.
    """

    def __init__(self, values: np.ndarray) -> None:
        values = values + 0.0  # a negative zero becomes a positive one, so that no sum is negative zero
        self._padded = np.append(values, 0.0)
        with np.errstate(over="ignore"):
            scaled = self._padded * 1024
            exact = bool((scaled == np.rint(scaled)).all()) and float(np.abs(scaled).sum()) < 2.0**53
        self.exact = exact
        self._running = np.concatenate([[0.0], np.cumsum(values)]) if exact else None

    def __call__(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """float64 ``[R]``: the sums of ``values[start[r]:stop[r]]``."""
        if self._running is not None:
            return np.asarray(self._running[stop] - self._running[start])
        with np.errstate(over="ignore", invalid="ignore"):
            return reduce_ranges(np.add, self._padded, start, stop)


def running_extremes(values: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The maximum of all values up to each position and the minimum of all from it on, each within its group.

    Args:
        values: int64 ``[N]``.
        group: int64 ``[N]``, ascending.
    """
    if not ((values[1:] < values[:-1]) & (group[1:] == group[:-1])).any():
        return values, values
    distinct, rank = np.unique(values, return_inverse=True)
    base = group * len(distinct)  # lifts each group above the one before, so that one pass over all groups restarts by itself
    highest = np.maximum.accumulate(base + rank) - base
    lowest = np.minimum.accumulate((base + rank)[::-1])[::-1] - base
    return distinct[highest], distinct[lowest]


def pieces(weights: np.ndarray, *, rows: int, weight: int) -> Iterator[slice]:
    """Consecutive slices of at most ``rows`` rows and ``weight`` in sum (but of one row at least); one empty slice where there are none."""
    ends = np.cumsum(weights)
    start = 0
    while start < len(ends):
        budget = weight + (ends[start - 1] if start else 0)
        stop = max(start + 1, min(start + rows, int(np.searchsorted(ends, budget, side="right"))))
        yield slice(start, stop)
        start = stop
    if len(ends) == 0:
        yield slice(0, 0)
