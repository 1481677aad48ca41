# SPDX-License-Identifier: Apache-2.0
"""Aggregates over windows that begin where a tile of time does, so that an online store keeps tiles instead of events.

At the request time t an event counts if ``event_time <= t``, ``available_time <= t`` and
``floor(event_time / tile) > floor((t - window) / tile)``: the head of the window is exact, and its tail moves by whole tiles (the
"sawtooth" windows of Chronon). Offline the raw log is evaluated by this definition. Online the tiles of the window are merged, each of
which holds all of its events that were materialised. States merge to the bit in any order (`feature_store.partials`),
so that both give equal values. Values that are not finite are left out like nulls.

What an event has added to a tile cannot be told apart from the rest. So the `TAIL` events of an entity that came to count last are kept
beside the tiles, one by one: an online store answers exactly from the moment on when all others count, also where the newest are of a later
time than the question. For an earlier t the status is ERROR. Tiles that no window reaches from that moment on are dropped, but for the
newest: ``window / tile + 1`` tiles are left at most, whatever the number of events.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.compiled import CompiledView
from feature_store.evaluate import PIECE_EVENTS, PIECE_ROWS, SECOND, Rows, Values, chosen, interleave, masked, pick
from feature_store.exact_sums import Sums
from feature_store.features import AnyFeature, Count, Distinct, Max, Mean, Min, Quantile, Sum
from feature_store.log import Log
from feature_store.partials import Counts, ExactSums, Extremes, Partial, Registers, Samples, States, partials_of
from feature_store.ranges import NEVER, bisect_right, expand, order_by, pieces, reduce_ranges
from feature_store.sketches import estimate, quantiles, registers
from recsys.core.hashing import hash64
from recsys.core.schema import INGEST_SEQ, TIME
from recsys.core.status import ValueStatus

_VALUE_SEED, _EVENT_SEED = 11, 12
TAIL = 16
"""How many events of an entity are kept one by one."""
_NUMBERS = 4
"""How many columns of `CompiledView.stored` precede the states."""
S = TypeVar("S", bound=States)


@dataclass(frozen=True)
class Tiles:
    """N tiles of E entities, and single events as tiles. Entity e has those from ``offsets[e]`` to before ``offsets[e + 1]``, ascending.

    Attributes:
        entities: string ``[E]``, distinct.
        offsets: int64 ``[E + 1]``.
        tile: int64 ``[N]``: ``floor(event_time / tile)``.
        event: int64 ``[N]``: the hash of a single event, 0 of a tile.
        newest: int64 ``[N]``, microseconds: the event time of the tile's newest event.
        since: int64 ``[N]``, microseconds: from when on a single event counts; of a tile, from when on all events of the entity's tiles do.
        states: what is kept, each of N rows.
    """

    entities: pa.Array
    offsets: np.ndarray
    tile: np.ndarray
    event: np.ndarray
    newest: np.ndarray
    since: np.ndarray
    states: dict[Partial, States]

    @property
    def entity(self) -> np.ndarray:
        """int64 ``[N]``: the place of each tile's entity."""
        return np.repeat(np.arange(len(self.entities)), np.diff(self.offsets))

    def table(self, view: CompiledView) -> pa.Table:
        """``[N]`` with the columns of `CompiledView.stored`."""
        times = [pa.array(values, pa.int64()).cast(TIME) for values in (self.newest, self.since)]
        states = [column for partial in view.partials for column in self.states[partial].to_arrow()]
        numbers = [pa.array(values, pa.int64()) for values in (self.tile, self.event)]
        return pa.Table.from_arrays([*numbers, *times, *states], schema=view.stored)

    @classmethod
    def of_table(cls, view: CompiledView, entities: pa.Array, offsets: np.ndarray, table: pa.Table) -> "Tiles":
        """What `table` gave."""
        columns = [column.combine_chunks() for column in table.columns]
        tile, event, newest, since = (np.asarray(column.cast(pa.int64())) for column in columns[:_NUMBERS])
        states, first = {}, _NUMBERS
        for partial in view.partials:
            last = first + len(partial.fields(""))
            states[partial] = partial.of_arrow(columns[first:last])
            first = last
        return cls(entities, offsets, tile, event, newest, since, states)

    def latest(self, among: np.ndarray) -> np.ndarray:
        """int64 ``[E]``: from when on all tiles and events of an entity that are ``among`` (bool ``[N]``) count; `NEVER` without any."""
        latest = np.full(len(self.entities), NEVER)
        np.maximum.at(latest, self.entity[among], self.since[among])
        return latest


def tiles_of_events(view: CompiledView, log: Log) -> Tiles:
    """Every event of a log as a tile of its own, in the order of the log."""
    states = {partial: _of_events(view, log, partial) for partial in view.partials}
    hashes = _event_hashes(log)
    return Tiles(log.entities, log.offsets, log.event_time // _width(view), hashes, log.event_time, log.visible_time, states)


def together(view: CompiledView, parts: Sequence[Tiles]) -> Tiles:
    """The tiles of several, one for each entity and number, without those that no window can reach any more; the last events one by one."""
    entity = pa.concat_arrays([part.entities.take(pa.array(part.entity)) for part in parts]).dictionary_encode()
    codes, table = np.asarray(entity.indices, np.int64), pa.concat_tables([part.table(view) for part in parts])
    tile, event, newest, since = (np.concatenate([getattr(part, name) for part in parts]) for name in ("tile", "event", "newest", "since"))
    single = (event != 0) & (since > _sealed_until(codes, event, since, len(entity.dictionary))[codes])
    event = np.where(single, event, 0)
    order = order_by(codes, tile, single.astype(np.int64), np.where(single, newest, 0), event)
    offsets = np.searchsorted(codes[order], np.arange(len(entity.dictionary) + 1))
    tiles = Tiles.of_table(view, entity.dictionary, offsets, table.take(pa.array(order)))
    return _merged(view, replace(tiles, event=event[order]))


def _sealed_until(codes: np.ndarray, event: np.ndarray, since: np.ndarray, entities: int) -> np.ndarray:
    """int64 ``[E]``: which events are not kept one by one any more: those that count from then on or earlier.

    It depends on the events alone, not on what was sealed before: more than `TAIL` events are not earlier than the last that was.
    """
    sealed = np.full(entities, NEVER)
    np.maximum.at(sealed, codes[event == 0], since[event == 0])
    order = order_by(codes, since)
    offsets = np.searchsorted(codes[order], np.arange(entities + 1))
    place = offsets[1:] - TAIL - 1
    there = place >= offsets[:-1]
    return np.asarray(np.maximum(sealed, np.append(since[order], NEVER)[np.where(there, place, -1)]))


def _merged(view: CompiledView, tiles: Tiles) -> Tiles:
    """One tile for each entity and number, beside the single events."""
    entity, single = tiles.entity, tiles.event != 0
    begins = np.ones(len(entity), bool)
    begins[1:] = (entity[1:] != entity[:-1]) | (tiles.tile[1:] != tiles.tile[:-1]) | single[1:]
    start = np.flatnonzero(begins)
    stop = np.append(start[1:], len(begins))[: len(start)]
    sealed = tiles.latest(~single)
    entity, number, single = entity[start], tiles.tile[start], single[start]
    last = np.full(len(tiles.entities), NEVER)
    np.maximum.at(last, entity[~single], number[~single])
    kept = single | (number == last[entity]) | (number > (sealed[entity] - _longest(view) * SECOND) // _width(view))
    newest = np.maximum.reduceat(tiles.newest, start) if len(start) else tiles.newest
    since = np.where(single, tiles.since[start], sealed[entity])
    offsets = np.searchsorted(entity[kept], np.arange(len(tiles.entities) + 1))
    states = {partial: states.over(start[kept], stop[kept]) for partial, states in tiles.states.items()}
    return Tiles(tiles.entities, offsets, number[kept], tiles.event[start][kept], newest[kept], since[kept], states)


def evaluate_tiles(view: CompiledView, source: Log | Tiles, keys: pa.Array, time: np.ndarray, known: np.ndarray) -> Iterator[Values]:
    """Every feature of ``view`` for R pairs of key and time, in consecutive pieces that bound the memory.

    Args:
        view: what to evaluate.
        source: the raw log, or tiles, at least those of the keys.
        keys: string ``[R]``.
        time: int64 ``[R]``, microseconds.
        known: bool ``[R]``, False where key or time is null.
    """
    found = np.asarray(pc.index_in(keys, value_set=source.entities, skip_nulls=True).fill_null(-1), np.int64)
    place = np.where(known, found, -1)
    # An entity without events has an empty range; the last offset stands in for the place -1.
    first, last = source.offsets[place], source.offsets[np.where(place < 0, -1, place + 1)]
    if isinstance(source, Tiles):
        yield from _evaluate_stored(view, source, place, Rows(first, last, time, known))
        return
    tiles = source.cached("tiles", lambda: tiles_of_events(view, source))
    all_up_to, none_from = source.counted(first, last, time)
    rows, is_range = Rows(first, none_from, time, known), all_up_to == none_from
    # Of the events that all count, those before every window matter only in that there is one.
    picked_from = np.maximum(first, np.minimum(_window(view, tiles, rows, _longest(view)), all_up_to - 1))
    visited = np.where(is_range, _visited(view, tiles, rows), none_from - picked_from)
    for piece in pieces(visited, rows=PIECE_ROWS, weight=PIECE_EVENTS):
        yield _evaluate_log(view, source, tiles, rows.at(piece), is_range[piece], picked_from[piece])


def _evaluate_stored(view: CompiledView, tiles: Tiles, place: np.ndarray, rows: Rows) -> Iterator[Values]:
    """The rows' entities stand at ``place``, int64 ``[R]``, -1 where there are none."""
    single = tiles.event != 0
    sealed, latest = (np.append(tiles.latest(among), NEVER)[place] for among in (~single, np.ones(len(single), bool)))
    early, all_count = sealed > rows.time, latest <= rows.time
    for piece in pieces(_visited(view, tiles, rows), rows=PIECE_ROWS, weight=PIECE_EVENTS):
        some = rows.at(piece)
        if all_count[piece].all():
            yield _evaluate(view, tiles, some)
        else:
            yield _evaluate(view, *_pick(tiles, some), early[piece])


def _pick(tiles: Tiles, rows: Rows) -> tuple[Tiles, Rows]:
    """Tiles in which those of each row, and of the single events those that count, are a range."""
    length = rows.stop - rows.start
    positions = expand(rows.start, length)
    counts = (tiles.event[positions] == 0) | (tiles.since[positions] <= np.repeat(rows.time, length))
    offsets = np.concatenate([[0], np.cumsum(counts)])[np.concatenate([[0], np.cumsum(length)])]
    kept = positions[counts]
    states = {partial: states.over(kept, kept + 1) for partial, states in tiles.states.items()}
    tile, event, newest, since = (values[kept] for values in (tiles.tile, tiles.event, tiles.newest, tiles.since))
    picked = Tiles(pa.array([], pa.string()), offsets, tile, event, newest, since, states)
    return picked, Rows(offsets[:-1], offsets[1:], rows.time, rows.known)


def _evaluate_log(view: CompiledView, log: Log, tiles: Tiles, rows: Rows, is_range: np.ndarray, picked_from: np.ndarray) -> Values:
    if is_range.all():
        return _evaluate(view, tiles, rows)
    ranges, others = np.flatnonzero(is_range), np.flatnonzero(~is_range)
    late = rows.at(others)
    picked, of_picked = pick(log, Rows(picked_from[others], late.stop, late.time, late.known))
    values = _evaluate(view, tiles, rows.at(ranges)), _evaluate(view, tiles_of_events(view, picked), of_picked)
    return interleave(ranges, others, *values)


def _evaluate(view: CompiledView, tiles: Tiles, rows: Rows, early: np.ndarray | None = None) -> Values:
    evaluation = _Evaluation(view, tiles, rows, np.zeros(len(rows.time), bool) if early is None else early)
    return [evaluation.feature(feature) for feature in view.view.features]


class _Evaluation:
    """The features of rows whose counted events are those of ranges of tiles, except where it is too ``early`` to tell (bool ``[R]``)."""

    def __init__(self, view: CompiledView, tiles: Tiles, rows: Rows, early: np.ndarray) -> None:
        self._view, self._tiles, self._rows = view, tiles, rows
        some = rows.stop > rows.start
        newest = reduce_ranges(np.maximum, np.append(tiles.newest, 0), rows.start, rows.stop)
        status = np.full(len(some), ValueStatus.PRESENT, np.uint8)
        if view.view.ttl is not None:
            status[some & (rows.time - newest > view.view.ttl * SECOND)] = ValueStatus.EXPIRED
        status[early] = ValueStatus.ERROR
        status[~rows.known] = ValueStatus.MISSING
        self._additive, self._status = status, np.where(some, status, np.uint8(ValueStatus.MISSING))
        self._merged: dict[tuple[Partial, int | None], States] = {}

    def feature(self, feature: AnyFeature) -> tuple[pa.Array, np.ndarray]:
        """Values and statuses of one feature."""
        match feature:
            case Count():
                return self._additively(self._states(feature, Counts).counts)
            case Sum():
                return self._additively(self._states(feature, ExactSums).sums.values())
            case Distinct():
                held = self._states(feature, Registers)
                return self._additively(np.rint(estimate(held.offsets, held.codes, feature.precision)).astype(np.int64))
            case Mean():
                counts = self._states(feature, Counts).counts
                return self._where(counts > 0, self._states(feature, ExactSums).sums.values() / np.maximum(counts, 1))
            case Min() | Max():
                values = self._states(feature, Extremes).values
                return self._where(~np.isnan(values), values)
            case Quantile():
                sample = self._states(feature, Samples)
                return self._where(np.diff(sample.offsets) > 0, quantiles(sample.offsets, sample.values, feature.q))
            case _:
                raise TypeError(f"feature {feature.name!r}: {feature.kind!r} is not made of tiles")

    def _additively(self, values: np.ndarray) -> tuple[pa.Array, np.ndarray]:
        return masked(values, self._additive), self._additive

    def _where(self, there: np.ndarray, values: np.ndarray) -> tuple[pa.Array, np.ndarray]:
        """The values, NULL where the window has nothing to make one of."""
        status = np.where((self._status == ValueStatus.PRESENT) & ~there, np.uint8(ValueStatus.NULL), self._status)
        return masked(values, status), status

    def _states(self, feature: Count | Sum | Mean | Min | Max | Distinct | Quantile, kind: type[S]) -> S:
        """The merged states of this kind over the feature's window."""
        for partial in partials_of(feature):
            key = partial, feature.window
            if key not in self._merged:
                start = _window(self._view, self._tiles, self._rows, feature.window or 0)
                self._merged[key] = self._tiles.states[partial].over(start, self._rows.stop)
            if isinstance(states := self._merged[key], kind):
                return states
        raise TypeError(f"feature {feature.name!r} keeps no {kind.__qualname__}")


def _of_events(view: CompiledView, log: Log, partial: Partial) -> States:
    """The state of every event."""
    there = chosen(view, log, partial.column, partial.where)
    if partial.column is None:
        return Counts(there.astype(np.int64))
    if partial.kind == "distinct":
        hashes = hash64(log.array(partial.column), _VALUE_SEED)[there]
        return Registers(_one_each(there), registers(hashes, partial.size))
    # A negative zero becomes a positive one: neither is smaller.
    values = np.asarray(log.array(partial.column).cast(pa.float64(), safe=False).fill_null(0.0)) + 0.0
    there &= np.isfinite(values)
    match partial.kind:
        case "count":
            return Counts(there.astype(np.int64))
        case "sum":
            return ExactSums(Sums.of(np.where(there, values, 0.0)))
        case "sample":
            return Samples(_one_each(there), _event_hashes(log)[there], values[there], partial.size)
        case _:
            return Extremes(np.where(there, values, np.nan), partial.kind == "max")


def _one_each(there: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(there)])


def _event_hashes(log: Log) -> np.ndarray:
    """int64 ``[N]``: of what tells an event from the others of its entity, the same in every log that has it."""
    place = hash64(pa.array(log.integers(INGEST_SEQ), pa.int64()), _EVENT_SEED).view(np.int64)
    hashes = hash64(pa.array(place ^ log.event_time, pa.int64()), _EVENT_SEED).view(np.int64)
    return np.where(hashes == 0, 1, hashes)  # 0 stands for a tile


def _window(view: CompiledView, tiles: Tiles, rows: Rows, seconds: int) -> np.ndarray:
    """int64 ``[R]``: where the window begins among the tiles."""
    return bisect_right(tiles.tile, (rows.time - seconds * SECOND) // _width(view), rows.start, rows.stop)


def _visited(view: CompiledView, tiles: Tiles, rows: Rows) -> np.ndarray:
    """int64 ``[R]``: how much is laid out in memory to merge each row's tiles."""
    start = _window(view, tiles, rows, _longest(view))
    return np.asarray(sum((states.visited(start, rows.stop) for states in tiles.states.values()), np.ones(len(start), np.int64)))


def _width(view: CompiledView) -> int:
    """Microseconds of a tile."""
    assert view.view.tile is not None
    return view.view.tile * SECOND


def _longest(view: CompiledView) -> int:
    """Seconds of the longest window."""
    windows = (
        feature.window for feature in view.view.features if isinstance(feature, Count | Sum | Mean | Min | Max | Distinct | Quantile)
    )
    return max(window for window in windows if window is not None)
