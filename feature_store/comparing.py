# SPDX-License-Identifier: Apache-2.0
"""How far two columns are apart: numbers by sMAPE, lists by edit distance, all else by equality."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Compared:
    """Sums over pairs of values, which add up over parts.

    Attributes:
        numbers: how many pairs of numbers; their terms of the sMAPE add up to ``smape_sum``.
        lists: how many pairs of lists; their normalised edit distances add up to ``edit_sum``.
        largest: the greatest difference of two numbers, at most the largest float64; None without any.
    """

    numbers: int = 0
    smape_sum: float = 0.0
    lists: int = 0
    edit_sum: float = 0.0
    largest: float | None = None

    def __add__(self, other: "Compared") -> "Compared":
        largest = max((each for each in (self.largest, other.largest) if each is not None), default=None)
        sums = (self.numbers + other.numbers, self.smape_sum + other.smape_sum, self.lists + other.lists, self.edit_sum + other.edit_sum)
        return Compared(*sums, largest)

    @property
    def smape(self) -> float | None:
        """The mean over the pairs of numbers, from 0 to 2; None without any."""
        return self.smape_sum / self.numbers if self.numbers else None

    @property
    def edit_distance(self) -> float | None:
        """The mean over the pairs of lists, from 0 to 1; None without any."""
        return self.edit_sum / self.lists if self.lists else None


def compare(one: pa.Array, other: pa.Array) -> tuple[np.ndarray, Compared]:
    """Where N pairs of values without nulls differ, bool ``[N]``, and how far.

    Numbers that are not integers agree within ``1e-6 * max(1, |a|, |b|)``; integers, strings and lists exactly.
    """
    if pt.is_list(one.type):
        pairs = list(zip(one.to_pylist(), other.to_pylist(), strict=True))
        distances = np.array([edit_distance(a, b) for a, b in pairs], np.float64)
        return distances > 0, Compared(lists=len(pairs), edit_sum=float(distances.sum()))
    if pt.is_integer(one.type) or pt.is_floating(one.type):
        return _numbers(np.asarray(one), np.asarray(other))
    return np.asarray(pc.not_equal(one, other)), Compared()


def _numbers(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, Compared]:
    exact = a != b
    size = np.abs(a.astype(np.float64)), np.abs(b.astype(np.float64))
    with np.errstate(over="ignore", invalid="ignore"):
        # Infinities that are equal have no difference, and those that are not an infinite one.
        difference = np.where(exact, np.abs(a.astype(np.float64) - b.astype(np.float64)), 0.0)
        relative = np.where(difference > 0, 2 * difference / (size[0] + size[1]), 0.0)
        within = np.isfinite(difference) & (difference <= TOLERANCE * np.maximum(1.0, np.maximum(*size)))
    differs = exact if a.dtype.kind == "i" else exact & ~within
    largest = float(np.nan_to_num(difference, nan=np.finfo(np.float64).max).max()) if len(difference) else None
    return differs, Compared(numbers=len(a), smape_sum=float(np.nan_to_num(relative, nan=2.0).sum()), largest=largest)


def edit_distance(one: Sequence[Any], other: Sequence[Any]) -> float:
    """Insertions, deletions and replacements from one list to the other (Levenshtein), over the longer length: from 0 to 1."""
    if one == other:
        return 0.0
    codes: dict[Any, int] = {}
    a, b = (np.array([codes.setdefault(value, len(codes)) for value in each], np.int64) for each in (one, other))
    steps = np.arange(len(b) + 1)
    row = steps
    for place, code in enumerate(a, 1):
        without_insertion = np.concatenate([[place], np.minimum(row[1:] + 1, row[:-1] + (b != code))])
        row = np.minimum.accumulate(without_insertion - steps) + steps
    return float(row[-1]) / max(len(a), len(b))
