# SPDX-License-Identifier: Apache-2.0
"""The one evaluation of a view as of many points in time. Whether a log holds all entities or only those of a request makes no difference.

An event counts at t from its visible time on, the later of event time and available time. Where events become visible in order, those
that count are a range of the log. Where one was late, the events that count are picked out and evaluated as a log of their own: not all of
them, since up to the first late one they are a range again, whose counts and sums are added, so that what a late event costs does not grow
with what happened before it. (Sums are only split where they are exact, for others depend on how they are split.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.compiled import CompiledView
from feature_store.features import AnyFeature, Attribute, Condition, Count, Elapsed, LastN, Mean, Sum
from feature_store.log import Log
from feature_store.ranges import RangeSums, bisect_right, expand, pieces
from recsys.core.status import ValueStatus

SECOND = 1_000_000
PIECE_ROWS, PIECE_EVENTS = 1 << 16, 1 << 22

Values = list[tuple[pa.Array, np.ndarray]]
"""For each feature of a view, in order: its values, and uint8 statuses."""


@dataclass(frozen=True)
class Rows:
    """R points in time of entities.

    Attributes:
        start, stop: int64 ``[R]``, the range of a log that counts.
        time: int64 ``[R]``, the request time in microseconds.
        known: bool ``[R]``, False where entity or time is null.
    """

    start: np.ndarray
    stop: np.ndarray
    time: np.ndarray
    known: np.ndarray

    def at(self, chosen: np.ndarray | slice) -> "Rows":
        """Only these rows."""
        return Rows(self.start[chosen], self.stop[chosen], self.time[chosen], self.known[chosen])


def evaluate(view: CompiledView, log: Log, keys: pa.Array, time: np.ndarray, known: np.ndarray) -> Iterator[Values]:
    """Every feature of ``view`` for R pairs of key and time, in consecutive pieces that bound the memory.

    Args:
        view: what to evaluate.
        log: its events, at least those of the keys.
        keys: string ``[R]``.
        time: int64 ``[R]``, microseconds.
        known: bool ``[R]``, False where key or time is null.
    """
    place = np.where(known, log.find(keys), -1)
    # An entity without events has an empty range; the last offset stands in for the place -1.
    first, last = log.offsets[place], log.offsets[np.where(place < 0, -1, place + 1)]
    all_up_to, none_from = log.counted(first, last, time)
    is_range = all_up_to == none_from
    rows = Rows(first, none_from, time, known)
    longest = max((f.n for f in view.view.features if isinstance(f, LastN | Elapsed)), default=1)
    picked_from = first if is_range.all() or not _sums_are_exact(view, log) else np.maximum(first, all_up_to - longest)
    visited = np.where(is_range, np.minimum(none_from - first, longest), none_from - picked_from)
    for piece in pieces(visited, rows=PIECE_ROWS, weight=PIECE_EVENTS):
        yield _evaluate_piece(view, log, rows.at(piece), is_range[piece], picked_from[piece])


def _sums_are_exact(view: CompiledView, log: Log) -> bool:
    return all(_sums(view, log, feature).exact for feature in view.view.features if isinstance(feature, Sum | Mean))


def _evaluate_piece(view: CompiledView, log: Log, rows: Rows, is_range: np.ndarray, picked_from: np.ndarray) -> Values:
    if is_range.all():
        return _evaluate_ranges(view, log, rows)
    ranges, others = np.flatnonzero(is_range), np.flatnonzero(~is_range)
    of_ranges = _evaluate_ranges(view, log, rows.at(ranges))
    late = rows.at(others)
    before = Rows(late.start, picked_from[others], late.time, late.known)
    picked = pick(log, Rows(before.stop, late.stop, late.time, late.known))
    of_others = _evaluate_ranges(view, *picked, before=_Evaluation(view, log, before))
    return interleave(ranges, others, of_ranges, of_others)


def interleave(ranges: np.ndarray, others: np.ndarray, of_ranges: Values, of_others: Values) -> Values:
    """The values of rows of two sorts, each at its place.

    Args:
        ranges: int64, the places of the first sort.
        others: int64, those of the second.
        of_ranges: the values of the first.
        of_others: those of the second.
    """
    back = np.argsort(np.concatenate([ranges, others]))
    return [
        (pa.concat_arrays([one, other]).take(pa.array(back)), np.concatenate([its_status, other_status])[back])
        for (one, its_status), (other, other_status) in zip(of_ranges, of_others, strict=True)
    ]


def pick(log: Log, rows: Rows) -> tuple[Log, Rows]:
    """A log in which the visible events of each row, and no others, are a range."""
    length = rows.stop - rows.start
    positions = expand(rows.start, length)
    visible = log.visible_time[positions] <= np.repeat(rows.time, length)
    offsets = np.concatenate([[0], np.cumsum(visible)])[np.concatenate([[0], np.cumsum(length)])]
    return log.take(positions[visible], offsets), Rows(offsets[:-1], offsets[1:], rows.time, rows.known)


def _evaluate_ranges(view: CompiledView, log: Log, rows: Rows, before: "_Evaluation | None" = None) -> Values:
    evaluation = _Evaluation(view, log, rows, before)
    return [evaluation.feature(feature) for feature in view.view.features]


class _Evaluation:
    """The features of rows whose counted events are ranges of a log, and for counts and sums those of ``before``, too.

    Where ``before`` has events of a row, the range of the row has at least the longest list that a feature asks for.
    """

    def __init__(self, view: CompiledView, log: Log, rows: Rows, before: "_Evaluation | None" = None) -> None:
        self._view = view
        self._log = log
        self._rows = rows
        self._before = before
        self._any = rows.stop > rows.start
        expired = self._age_us() > view.view.ttl * SECOND if view.view.ttl is not None else np.zeros(len(self._any), bool)
        self._additive = np.where(expired, ValueStatus.EXPIRED, ValueStatus.PRESENT).astype(np.uint8)
        self._additive[~rows.known] = ValueStatus.MISSING
        self._status = np.where(self._any, self._additive, np.uint8(ValueStatus.MISSING))
        self._windows: dict[int | None, np.ndarray] = {None: rows.start}
        self._ends: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def feature(self, feature: AnyFeature) -> tuple[pa.Array, np.ndarray]:
        """Values and statuses of one feature."""
        match feature:
            case Attribute():
                return self._attribute(feature.column)
            case Count():
                return masked(self._count(feature, None), self._additive), self._additive
            case Sum():
                return masked(self._sum(feature), self._additive), self._additive
            case Mean():
                counted = self._count(feature, feature.column)
                status = np.where((self._status == ValueStatus.PRESENT) & (counted == 0), np.uint8(ValueStatus.NULL), self._status)
                return masked(self._sum(feature) / np.maximum(counted, 1), status), status
            case LastN():
                positions, _ = self._last(feature.n)
                return self._lists(feature.n, self._log.values(feature.column, self._log.places(pa.array(positions)))), self._status
            case Elapsed():
                positions, length = self._last(feature.n)
                elapsed = np.repeat(self._rows.time, length) - self._log.event_time[positions]
                return self._lists(feature.n, pa.array(elapsed / SECOND)), self._status
            case _:
                return masked(self._age_us() / SECOND, self._status), self._status

    def _age_us(self) -> np.ndarray:
        """int64 ``[R]``: microseconds since the newest event, 0 where there is none."""
        age = np.zeros(len(self._any), np.int64)
        age[self._any] = self._rows.time[self._any] - self._log.event_time[self._rows.stop[self._any] - 1]
        return age

    @cached_property
    def _newest(self) -> pa.Array:
        """int64 ``[R]``: the place of the newest event, null where the status is not PRESENT."""
        return self._log.places(pa.array(self._rows.stop - 1, mask=self._status != ValueStatus.PRESENT))

    def _attribute(self, column: str) -> tuple[pa.Array, np.ndarray]:
        values = self._log.values(column, self._newest)
        if values.null_count == self._newest.null_count:
            return values, self._status
        absent = np.asarray(pc.is_null(values)) & (self._status == ValueStatus.PRESENT)
        return values, np.where(absent, np.uint8(ValueStatus.NULL), self._status)

    def _window(self, seconds: int | None) -> np.ndarray:
        """int64 ``[R]``: where the window begins in the log."""
        if seconds is not None and seconds not in self._windows:
            opened = self._rows.time - seconds * SECOND
            self._windows[seconds] = bisect_right(self._log.event_time, opened, self._rows.start, self._rows.stop)
        return self._windows[seconds]

    def _count(self, feature: Count | Mean, column: str | None) -> np.ndarray:
        """int64 ``[R]``: the events that meet the conditions and have a value in ``column``, if one is given."""
        start, stop = self._window(feature.window), self._rows.stop
        if column is not None or feature.where:
            before = self._log.cached(
                ("before", column, feature.where), lambda: _counts(chosen(self._view, self._log, column, feature.where))
            )
            start, stop = before[start], before[stop]
        count = np.asarray(stop - start)
        return count if self._before is None else count + self._before._count(feature, column)

    def _sum(self, feature: Sum | Mean) -> np.ndarray:
        """float64 ``[R]``: the sum of the values in the events that meet the conditions."""
        total = _sums(self._view, self._log, feature)(self._window(feature.window), self._rows.stop)
        return total if self._before is None else total + self._before._sum(feature)

    def _last(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The positions of the last ``n`` events of all rows, and int64 ``[R]`` how many each row has, 0 where it is not PRESENT."""
        if n not in self._ends:
            length = np.minimum(self._rows.stop - self._rows.start, n)
            length[self._status != ValueStatus.PRESENT] = 0
            self._ends[n] = (expand(self._rows.stop - length, length), length)
        return self._ends[n]

    def _lists(self, n: int, elements: pa.Array) -> pa.Array:
        """The elements at the positions of `_last` as one list per row, null where the status is not PRESENT."""
        offsets = pa.array(np.concatenate([[0], np.cumsum(self._last(n)[1])]), pa.int32())
        return pa.ListArray.from_arrays(offsets, elements, mask=pa.array(self._status != ValueStatus.PRESENT))


def _sums(view: CompiledView, log: Log, feature: Sum | Mean) -> RangeSums:
    """Of the values in the events that meet the conditions."""

    def make() -> RangeSums:
        values = np.asarray(log.array(feature.column).cast(pa.float64(), safe=False).fill_null(0.0))
        return RangeSums(np.where(chosen(view, log, feature.column, feature.where), values, 0.0))

    return log.cached(("sums", feature.column, feature.where), make)


def chosen(view: CompiledView, log: Log, column: str | None, where: tuple[Condition, ...]) -> np.ndarray:
    """bool ``[N]``: the events that meet the conditions and have a value in ``column``, if one is given."""
    selected = np.ones(len(log), bool)
    if where:
        selected = log.select(view.conditions[where])
    return selected if column is None else selected & np.asarray(pc.is_valid(log.array(column)))


def masked(values: np.ndarray, status: np.ndarray) -> pa.Array:
    """The values, null where the status is not PRESENT."""
    return pa.array(values, mask=status != ValueStatus.PRESENT)


def _counts(selected: np.ndarray) -> np.ndarray:
    """int64 ``[N + 1]``: how many are selected before each position."""
    return np.concatenate([[0], np.cumsum(selected)])
