# SPDX-License-Identifier: Apache-2.0
"""Sums of float64 values without rounding: they do not depend on the order or on how the values are grouped, and can be subtracted.

A sum is a whole number of units of 2**-1152, below every float64, in digits of 32 bits with a sign (Neal, "Fast exact summation using
small and large superaccumulators", 2015). Digits that were carried lie in [-2**31, 2**31), so that equal sums have equal digits. Only the
digits that some value reaches are kept: three or four of seventy for values of like size. `Sums.values` rounds once, to the nearest.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from feature_store.ranges import expand

_BITS, _UNIT = 32, -1152
_BASE, _HALF = np.int64(1) << np.int64(_BITS), np.int64(1) << np.int64(_BITS - 1)
_LOW = np.uint64(0xFFFFFFFF)
_SMALLEST_NORMAL = -960
"""From this exponent on, a whole number of 63 bits times a power of two is rounded once by the conversion to float64."""


@dataclass(frozen=True)
class Sums:
    """N sums.

    Attributes:
        first: the place of the first digit.
        digits: int64 ``[N, D]``, carried; digit d counts ``2**(32 * (first + d) - 1152)``.
    """

    first: int
    digits: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "Sums":
        """Each value (float64 ``[N]``, finite) as a sum of its own."""
        mantissa, exponent = np.frexp(values)
        size = np.abs(np.ldexp(mantissa, 53)).astype(np.uint64)
        shift = exponent.astype(np.int64) - 53 - _UNIT
        place = np.where(size > 0, shift >> 5, np.iinfo(np.int64).max)
        first = int(place.min(initial=np.iinfo(np.int64).max))
        if first == np.iinfo(np.int64).max:
            return cls(0, np.zeros((len(values), 0), np.int64))
        place = np.where(size > 0, place, first)
        bits = (shift & 31).astype(np.uint64)
        low, high = (size & _LOW) << bits, (size >> np.uint64(32)) << bits
        upper = (low >> np.uint64(32)) + high
        sign = np.where(values < 0, -1, 1)
        digits = np.zeros((len(values), int(place.max()) - first + 3), np.int64)
        rows = np.arange(len(values))
        for step, digit in enumerate((low & _LOW, upper & _LOW, upper >> np.uint64(32))):
            digits[rows, place - first + step] = sign * digit.astype(np.int64)
        return cls(first, _carried(digits))

    def __len__(self) -> int:
        return len(self.digits)

    def over(self, start: np.ndarray, stop: np.ndarray) -> "Sums":
        """The sums of the rows ``[start[r], stop[r])``; together there must be fewer than 2**31 rows."""
        return Sums(self.first, _carried(self._running[stop] - self._running[start]))

    @cached_property
    def _running(self) -> np.ndarray:
        return np.concatenate([np.zeros((1, self.digits.shape[1]), np.int64), np.cumsum(self.digits, axis=0)])

    def values(self) -> np.ndarray:
        """float64 ``[N]``: each sum, rounded once to the nearest; infinite where it is too large."""
        used = np.flatnonzero((self.digits != 0).any(axis=0))
        if not len(used):
            return np.zeros(len(self))
        low, width = int(used[0]), int(used[-1] - used[0] + 1)
        digits, exponent = self.digits[:, low : low + width], _BITS * (self.first + low) + _UNIT
        fits = width == 1 or (width == 2 and int(np.abs(digits[:, 1]).max()) < int(_HALF) >> 1)
        if fits and _SMALLEST_NORMAL <= exponent <= 900:
            whole = digits[:, 0] + (digits[:, 1] * _BASE if width == 2 else 0)
            return np.asarray(np.ldexp(whole.astype(np.float64), exponent))
        return np.array([_rounded(row, exponent) for row in digits.tolist()], np.float64)

    def ragged(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The digits that are needed: int64 ``[N]`` place of the first one of each sum, ``[N + 1]`` offsets, and the digits.

        A sum of 0 has the place 0 and no digits.
        """
        if not self.digits.shape[1]:
            return np.zeros(len(self), np.int64), np.zeros(len(self) + 1, np.int64), np.zeros(0, np.int64)
        there = self.digits != 0
        some, begin = there.any(axis=1), there.argmax(axis=1)
        length = np.where(some, there.shape[1] - there[:, ::-1].argmax(axis=1) - begin, 0)
        digits = self.digits[np.repeat(np.arange(len(self)), length), expand(begin, length)]
        return np.where(some, begin + self.first, 0), np.concatenate([[0], np.cumsum(length)]), digits

    @classmethod
    def of_ragged(cls, place: np.ndarray, offsets: np.ndarray, digits: np.ndarray) -> "Sums":
        """What `ragged` gave."""
        length = np.diff(offsets)
        some = length > 0
        if not some.any():
            return cls(0, np.zeros((len(place), 0), np.int64))
        first = int(place[some].min())
        dense = np.zeros((len(place), int((place + length)[some].max()) - first), np.int64)
        dense[np.repeat(np.arange(len(place)), length), expand(place - first, length)] = digits
        return cls(first, dense)


def _carried(digits: np.ndarray) -> np.ndarray:
    """The same sums with digits in [-2**31, 2**31); as many as are needed."""
    if not digits.shape[1]:
        return digits
    carried = np.concatenate([digits, np.zeros((len(digits), 2), np.int64)], axis=1)
    for place in range(carried.shape[1] - 1):
        carry = (carried[:, place] + _HALF) >> np.int64(_BITS)
        carried[:, place] -= carry << np.int64(_BITS)
        carried[:, place + 1] += carry
    used = np.flatnonzero((carried != 0).any(axis=0))
    return carried[:, : int(used[-1]) + 1 if len(used) else 1]


def _rounded(digits: list[int], exponent: int) -> float:
    """``sum(d * 2**(32 * i)) * 2**exponent`` as the nearest float64."""
    whole = sum(digit << (_BITS * place) for place, digit in enumerate(digits))
    try:
        return float(whole << exponent) if exponent >= 0 else whole / (1 << -exponent)
    except OverflowError:
        return float("inf") if whole > 0 else float("-inf")
