# SPDX-License-Identifier: Apache-2.0
"""What is kept of the events of a tile: partial states, which are merged over any range of tiles, and of events alike.

A single event is a tile of its own here. Every merge is associative and commutative to the bit: what a range gives does not depend on how
its events are grouped, so that the tiles of an online store give what the raw log gives.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import numpy as np
import pyarrow as pa

from feature_store.exact_sums import Sums
from feature_store.features import AnyFeature, Condition, Count, Distinct, Max, Mean, Min, Quantile, Sum
from feature_store.ranges import expand, reduce_ranges
from feature_store.sketches import merge_registers, smallest

_LIST = pa.list_(pa.int64())
_FIELDS: dict[str, tuple[tuple[str, pa.DataType], ...]] = {
    "count": (("count", pa.int64()),),
    "sum": (("place", pa.int64()), ("digits", _LIST)),
    "min": (("value", pa.float64()),),
    "max": (("value", pa.float64()),),
    "distinct": (("registers", _LIST),),
    "sample": (("hashes", _LIST), ("values", pa.list_(pa.float64()))),
}


@dataclass(frozen=True)
class Partial:
    """A state that is kept of each tile. Features that need the same one share it, whatever their windows.

    Attributes:
        kind: see `States`.
        column: whose values count; None for all events.
        where: the conditions of an event.
        size: of ``distinct`` the precision, of ``sample`` how many events it holds.
    """

    kind: Literal["count", "sum", "min", "max", "distinct", "sample"]
    column: str | None
    where: tuple[Condition, ...]
    size: int = 0

    def fields(self, prefix: str) -> list[pa.Field]:
        """The columns that hold the state, see `States.to_arrow`."""
        # An extreme of no values is null.
        return [pa.field(f"{prefix}.{name}", kind, nullable=name == "value") for name, kind in _FIELDS[self.kind]]

    def of_arrow(self, columns: Sequence[pa.Array]) -> "States":
        """The states of N tiles, of the columns that `fields` names."""
        match self.kind:
            case "count":
                return Counts(np.asarray(columns[0], np.int64))
            case "sum":
                return ExactSums(Sums.of_ragged(np.asarray(columns[0], np.int64), *_elements(columns[1])))
            case "min" | "max":
                return Extremes(np.asarray(columns[0].fill_null(np.nan)), self.kind == "max")
            case "distinct":
                return Registers(*_elements(columns[0]))
            case _:
                offsets, hashes = _elements(columns[0])
                return Samples(offsets, hashes, _elements(columns[1])[1], self.size)


def partials_of(feature: AnyFeature) -> tuple[Partial, ...]:
    """The states that an aggregate is made of."""
    match feature:
        case Count():
            return (Partial("count", None, feature.where),)
        case Sum():
            return (Partial("sum", feature.column, feature.where),)
        case Mean():
            return (Partial("sum", feature.column, feature.where), Partial("count", feature.column, feature.where))
        case Min():
            return (Partial("min", feature.column, feature.where),)
        case Max():
            return (Partial("max", feature.column, feature.where),)
        case Distinct():
            return (Partial("distinct", feature.column, feature.where, feature.precision),)
        case Quantile():
            return (Partial("sample", feature.column, feature.where, feature.size),)
        case _:
            return ()


class States(ABC):
    """The states of one kind in N tiles."""

    @abstractmethod
    def over(self, start: np.ndarray, stop: np.ndarray) -> Self:
        """The merged states of the tiles ``[start[r], stop[r])``, for each of R ranges."""

    @abstractmethod
    def to_arrow(self) -> list[pa.Array]:
        """One array for each of `Partial.fields`; equal states give equal arrays."""

    def visited(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """int64 ``[R]``: how many elements are laid out in memory to merge each range."""
        return np.zeros(len(start), np.int64)


@dataclass(frozen=True)
class Counts(States):
    """Invertible. ``counts``: int64 ``[N]``."""

    counts: np.ndarray

    def over(self, start: np.ndarray, stop: np.ndarray) -> "Counts":
        """See `States.over`."""
        return Counts(self._running[stop] - self._running[start])

    @cached_property
    def _running(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.counts)])

    def to_arrow(self) -> list[pa.Array]:
        """See `States.to_arrow`."""
        return [pa.array(self.counts, pa.int64())]


@dataclass(frozen=True)
class ExactSums(States):
    """Invertible, see `feature_store.exact_sums`."""

    sums: Sums

    def over(self, start: np.ndarray, stop: np.ndarray) -> "ExactSums":
        """See `States.over`."""
        return ExactSums(self.sums.over(start, stop))

    def to_arrow(self) -> list[pa.Array]:
        """See `States.to_arrow`."""
        place, offsets, digits = self.sums.ragged()
        return [pa.array(place, pa.int64()), _lists(offsets, digits)]


@dataclass(frozen=True)
class Extremes(States):
    """``values``: float64 ``[N]``, NaN where there is none; their greatest if ``greatest``, else their smallest."""

    values: np.ndarray
    greatest: bool

    def over(self, start: np.ndarray, stop: np.ndarray) -> "Extremes":
        """See `States.over`."""
        operation = np.fmax if self.greatest else np.fmin
        return Extremes(reduce_ranges(operation, np.append(self.values, np.nan), start, stop), self.greatest)

    def to_arrow(self) -> list[pa.Array]:
        """See `States.to_arrow`."""
        return [pa.array(self.values, pa.float64(), mask=np.isnan(self.values))]


@dataclass(frozen=True)
class Registers(States):
    """``codes`` of HyperLogLog registers, those of tile n from ``offsets[n]`` to ``offsets[n + 1]``, ascending."""

    offsets: np.ndarray
    codes: np.ndarray

    def over(self, start: np.ndarray, stop: np.ndarray) -> "Registers":
        """See `States.over`."""
        positions, row = _laid_out(self.offsets, start, stop)
        row, codes = merge_registers(row, self.codes[positions])
        return Registers(_offsets(row, len(start)), codes)

    def to_arrow(self) -> list[pa.Array]:
        """See `States.to_arrow`."""
        return [_lists(self.offsets, self.codes)]

    def visited(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """See `States.visited`."""
        return np.asarray(self.offsets[stop] - self.offsets[start])


@dataclass(frozen=True)
class Samples(States):
    """Of each tile the ``size`` events with the smallest ``hashes`` (int64) and their ``values``, ascending by both."""

    offsets: np.ndarray
    hashes: np.ndarray
    values: np.ndarray
    size: int

    def over(self, start: np.ndarray, stop: np.ndarray) -> "Samples":
        """See `States.over`."""
        positions, row = _laid_out(self.offsets, start, stop)
        hashes, values = self.hashes[positions], self.values[positions]
        kept = smallest(row, hashes, values, self.size)
        return Samples(_offsets(row[kept], len(start)), hashes[kept], values[kept], self.size)

    def to_arrow(self) -> list[pa.Array]:
        """See `States.to_arrow`."""
        return [_lists(self.offsets, self.hashes), _lists(self.offsets, self.values)]

    def visited(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """See `States.visited`."""
        return np.asarray(self.offsets[stop] - self.offsets[start])


def _laid_out(offsets: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of the elements of all ranges of tiles, one range after another, and the range of each."""
    begin, length = offsets[start], offsets[stop] - offsets[start]
    return expand(begin, length), np.repeat(np.arange(len(start)), length)


def _offsets(row: np.ndarray, rows: int) -> np.ndarray:
    return np.searchsorted(row, np.arange(rows + 1))


def _lists(offsets: np.ndarray, elements: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(elements))


def _elements(lists: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Offsets int64 ``[N + 1]`` and the elements of lists without nulls."""
    lengths = np.asarray(lists.value_lengths(), np.int64)
    return np.concatenate([[0], np.cumsum(lengths)]), np.asarray(lists.flatten())
