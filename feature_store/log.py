# SPDX-License-Identifier: Apache-2.0
"""The events of a view, grouped by entity and ordered in time: what features are evaluated over, offline and online alike."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.compiled import CompiledView
from feature_store.definitions import TIMES
from feature_store.ranges import NEVER, bisect_right, order_by, running_extremes
from recsys.core.errors import DataError
from recsys.core.schema import AVAILABLE_TIME, EVENT_TIME, INGEST_SEQ

T = TypeVar("T")
FEW_CHUNKS = 8
"""A table of so many chunks is read as it is; one of more is copied into one."""


@dataclass(frozen=True)
class Log:
    """N events of E entities. Entity e has the events ``offsets[e]`` to ``offsets[e + 1]``, ordered by (event time, ingest_seq).

    Attributes:
        entities: string ``[E]``, distinct.
        offsets: int64 ``[E + 1]``.
        given: the events with the columns of `CompiledView.events`.
        order: int64 ``[N]``, where in ``given`` each event stands; None where they stand there in order. What is read of few of them is
            then taken from there, and columns that nothing needs in order are never put in order.
    """

    entities: pa.Array
    offsets: np.ndarray
    given: pa.Table
    order: np.ndarray | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return int(self.given.num_rows) if self.order is None else len(self.order)

    @cached_property
    def rows(self) -> pa.Table:
        """``[N]`` with the columns of `CompiledView.events`."""
        return self.given if self.order is None else self.given.combine_chunks().take(pa.array(self.order))

    @cached_property
    def event_time(self) -> np.ndarray:
        """int64 ``[N]``, microseconds; `NEVER` in a static source."""
        return self.integers(EVENT_TIME) if EVENT_TIME in self.given.column_names else np.full(len(self), NEVER)

    @cached_property
    def visible_time(self) -> np.ndarray:
        """int64 ``[N]``: from when on an event counts, the later of its event time and its available time."""
        static = AVAILABLE_TIME not in self.given.column_names
        return self.event_time if static else np.maximum(self.event_time, self.integers(AVAILABLE_TIME))

    def counted(self, first: np.ndarray, last: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in ``[first[r], last[r])``, the events of one entity, those that count at ``time[r]`` are.

        Returns:
            int64 ``[R]`` twice: all events before the former count; none from the latter on does.
        """
        none_from = bisect_right(self._visibility[1], time, first, last)
        if self._visibility[0] is self._visibility[1]:
            return none_from, none_from
        return bisect_right(self._visibility[0], time, first, last), none_from

    @cached_property
    def _visibility(self) -> tuple[np.ndarray, np.ndarray]:
        """Within its entity: the latest visible time up to each event, and the earliest from it on. Both ascend."""
        return running_extremes(self.visible_time, np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets)))

    def select(self, condition: pl.Expr) -> np.ndarray:
        """bool ``[N]``: where a boolean expression holds."""
        frame = pl.from_arrow(self.rows.select(sorted(set(condition.meta.root_names()))))
        assert isinstance(frame, pl.DataFrame)
        return frame.select(condition).to_series().to_numpy()

    def integers(self, name: str) -> np.ndarray:
        """A column without nulls as int64 ``[N]``; a time in microseconds."""
        values = np.asarray(self._given(name).cast(pa.int64()))
        return values if self.order is None else values[self.order]

    def array(self, name: str) -> pa.Array:
        """``[N]``: a column in one piece."""
        return self.cached(name, lambda: _in_order(self._given(name), self.order))

    def places(self, positions: pa.Array) -> pa.Array:
        """Where in ``given`` the events at ``positions`` (int64) stand; null where the position is."""
        return positions if self.order is None else pa.array(self.order).take(positions)

    def values(self, name: str, places: pa.Array) -> pa.Array:
        """A column's values at `places`, null where the place is."""
        return _taken(self.given.column(name), places)

    def _given(self, name: str) -> pa.Array:
        return self.cached(("given", name), lambda: _one_piece(self.given.column(name)))

    def cached(self, key: Any, make: Callable[[], T]) -> T:
        """What ``make`` gives, made once for each ``key``."""
        if key not in self._cache:
            self._cache[key] = make()
        value: T = self._cache[key]
        return value

    def find(self, keys: pa.Array) -> np.ndarray:
        """int64 ``[R]``: the place of each key among the entities, -1 where it is null or has no events."""
        return np.asarray(pc.index_in(keys, value_set=self.entities, skip_nulls=True).fill_null(-1), np.int64)

    def take(self, positions: np.ndarray, offsets: np.ndarray) -> "Log":
        """The log of other groups, which hold the events at ``positions``. Its groups are found by place only, not by `find`."""
        return Log(pa.array([], pa.string()), offsets, self.rows.take(pa.array(positions)))

    def slice(self, first: int, last: int) -> "Log":
        """The log of the entities from place ``first`` to before ``last``."""
        begin, end = self.offsets[first], self.offsets[last]
        return Log(self.entities.slice(first, last - first), self.offsets[first : last + 1] - begin, self.rows.slice(begin, end - begin))


def read_rows(view: CompiledView, table: pa.Table) -> pa.Table:
    """What a view reads from the table of its source. Rows without an entity are left out; NaN becomes null.

    Raises:
        SchemaError: a column is absent or of another type.
        DataError: an event lacks a time.
    """
    what = _what(view)
    rows = view.columns.conform(table, what=what)
    if rows.column(view.view.entity).null_count:
        rows = rows.filter(pc.is_valid(rows.column(view.view.entity)))
    for name in () if view.is_static else TIMES:
        if rows.column(name).null_count:
            raise DataError(f"{what}: expected a value of {name!r} in every row, but {rows.column(name).null_count} are null")
    rows = without_nan(rows)
    return rows if all(column.num_chunks <= FEW_CHUNKS for column in rows.columns) else rows.combine_chunks()


def build_log(view: CompiledView, rows: pa.Table) -> Log:
    """Group and order what `read_rows` gave, in any order.

    An event that occurs twice, with equal entity, event time and ``ingest_seq``, counts once: as its first row.

    Raises:
        DataError: a static source has two rows for one entity.
    """
    encoded = _one_piece(rows.column(view.view.entity)).dictionary_encode()
    codes = np.asarray(encoded.indices, np.int64)
    order = order_by(codes) if view.is_static else _order_of_events(rows, codes)
    codes = codes[order]
    if view.is_static and (codes[1:] == codes[:-1]).any():
        twice = encoded.dictionary[int(codes[1:][codes[1:] == codes[:-1]][0])].as_py()
        raise DataError(f"{_what(view)}: expected one row for each {view.view.entity}, but {twice!r} has several")
    offsets = np.searchsorted(codes, np.arange(len(encoded.dictionary) + 1))
    return Log(encoded.dictionary, offsets, rows.select(view.events.names).cast(view.events), order)


def without_nan(rows: pa.Table) -> pa.Table:
    """The table with NaN as null."""
    for place, column in enumerate(rows.schema):
        if column.type == pa.float64():
            values = rows.column(place)
            nan = pc.is_nan(values)
            if pc.any(nan).as_py():
                rows = rows.set_column(place, column, pc.if_else(nan, None, values))
    return rows


def _one_piece(column: pa.ChunkedArray) -> pa.Array:
    """The column without a copy, where it is in one piece already."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _taken(column: pa.ChunkedArray, places: pa.Array) -> pa.Array:
    """The values at ``places`` in one piece; chunk by chunk, since pyarrow's own way over chunks takes ten times as long."""
    if column.num_chunks <= 1:
        return _one_piece(column).take(places)
    first, found = 0, []
    for chunk in column.chunks:
        inside = pc.and_(pc.greater_equal(places, first), pc.less(places, first + len(chunk)))
        found.append(chunk.take(pc.if_else(inside, pc.subtract(places, first), None)))
        first += len(chunk)
    return pc.coalesce(*found)


def _in_order(values: pa.Array, order: np.ndarray | None) -> pa.Array:
    return values if order is None else values.take(pa.array(order))


def _what(view: CompiledView) -> str:
    return f"table {view.source.table!r} of view {view.view.name!r}"


def _order_of_events(rows: pa.Table, codes: np.ndarray) -> np.ndarray:
    """The positions of the distinct events, by (entity, event time, ingest_seq)."""
    event_time, ingest_seq = (np.asarray(rows.column(name).cast(pa.int64())) for name in (EVENT_TIME, INGEST_SEQ))
    order = order_by(codes, event_time, ingest_seq)
    first = np.arange(len(order)) == 0
    for values in (codes, event_time, ingest_seq):
        ordered = values[order]
        first[1:] |= ordered[1:] != ordered[:-1]
    return order if first.all() else np.compress(first, order)
