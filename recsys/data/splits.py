# SPDX-License-Identifier: Apache-2.0
"""Which events train, which validate and which test; and the order of events that a model may see.

The default is one split of the time line for all users. Leaving out each user's last events instead lets a model learn from events that
happen after the ones it is tested on, which makes even the order of models unpredictable (Sun et al., "Take a Fresh Look at Recommender
Systems from an Evaluation Standpoint", SIGIR 2023; Ji et al., "A Critical Study on Data Leakage in Recommender System Offline
Evaluation", TOIS 2023).
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recsys.core.errors import DataError, SchemaError, unknown
from recsys.core.schema import EVENT_TIME, INGEST_SEQ, ITEM, TIME, USER
from recsys.data.frames import from_arrow

STEP, POSITION = "step", "position"
PARTS = ("train", "valid", "test")
ESTABLISHED_EVENTS = 5

_SECOND = 1_000_000  # microseconds


@dataclass(frozen=True)
class TimeSplit:
    """Two instants on whole seconds: training ends before ``valid_start``, validation before ``test_start``.

    Raises:
        DataError: an instant has no UTC offset or is not on a whole second, or they are not in order.
    """

    valid_start: datetime
    test_start: datetime

    def __post_init__(self) -> None:
        for name in ("valid_start", "test_start"):
            instant: datetime = getattr(self, name)
            if instant.tzinfo is None or instant.microsecond:
                raise DataError(f"{name}: expected a whole second with an offset from UTC, got {instant.isoformat()}")
            object.__setattr__(self, name, instant.astimezone(UTC))
        if not self.valid_start < self.test_start:
            raise DataError(f"valid_start {self.valid_start.isoformat()} must lie before test_start {self.test_start.isoformat()}")

    def parts(self, table: pa.Table) -> dict[str, pa.Table]:
        """``train``, ``valid`` and ``test``: the rows by their ``event_time``, each in the order of ``table``; a part may be empty.

        Raises:
            DataError: an ``event_time`` is null.
        """
        times = table.column(EVENT_TIME)
        if times.null_count:
            raise DataError(f"{EVENT_TIME}: expected no nulls, got {times.null_count}")
        valid_start, test_start = (pa.scalar(instant, TIME) for instant in (self.valid_start, self.test_start))
        before_valid, before_test = pc.less(times, valid_start), pc.less(times, test_start)
        masks = (before_valid, pc.and_not(before_test, before_valid), pc.invert(before_test))
        parts = {name: table.filter(mask) for name, mask in zip(PARTS, masks, strict=True)}
        self._assert_apart(parts)
        return parts

    def _assert_apart(self, parts: dict[str, pa.Table]) -> None:
        """The definition: max(train) < valid_start <= valid < test_start <= test."""
        first, last = {}, {}
        for name, part in parts.items():
            extremes = pc.min_max(part.column(EVENT_TIME)).as_py()
            first[name], last[name] = extremes["min"], extremes["max"]
        assert last["train"] is None or last["train"] < self.valid_start
        assert first["valid"] is None or self.valid_start <= first["valid"] <= last["valid"] < self.test_start
        assert first["test"] is None or self.test_start <= first["test"]


def global_time_split(event_time: pa.Array | pa.ChunkedArray, valid: float, test: float) -> TimeSplit:
    """One split of the time line, with the fractions of events as near to those asked for as whole seconds allow.

    ``test_start`` comes first: of the seconds that hold events, the one after which the count of events is nearest to ``test`` times
    all. Then ``valid_start`` likewise among the seconds before it. Of two equally near the earlier is taken. No part is empty.

    Args:
        event_time: timestamp[us, UTC], in any order.
        valid: the fraction of events to validate on, between 0 and 1.
        test: the fraction of events to test on; the two leave something to train on.

    Raises:
        DataError: the fractions make no sense, a time is null, or the events lie in fewer than three seconds.
    """
    if not (valid > 0 and test > 0 and valid + test < 1):
        raise DataError(f"expected fractions above 0 whose sum is below 1, got valid={valid} and test={test}")
    seconds, counts = np.unique(_whole_seconds(event_time), return_counts=True)
    if len(seconds) < 3:
        raise DataError(f"a split by time needs events in at least 3 different seconds, got {len(seconds)}")
    # from_second[i] events lie in second i or later.
    from_second = np.cumsum(counts[::-1])[::-1]
    total = int(from_second[0])
    test_index = 2 + int(np.argmin(np.abs(from_second[2:] - test * total)))
    in_valid = from_second[1:test_index] - from_second[test_index]
    valid_index = 1 + int(np.argmin(np.abs(in_valid - valid * total)))
    valid_start, test_start = (datetime.fromtimestamp(int(seconds[i]), UTC) for i in (valid_index, test_index))
    return TimeSplit(valid_start, test_start)


def order_events(interactions: pa.Table, seed: int) -> pa.Table:
    """The events by user, then second; within one user's second, which is one step, in an order that depends on ``seed`` alone.

    Sources often write the events of one second in the order of item ids, which says something about the items and nothing about the
    user. A hash of (seed, user, item, time) puts another order in its place, the same whatever the order of the rows. Events that share
    all of these follow ``ingest_seq`` where the table has it.

    Args:
        interactions: ``user_id``, ``item_id``, ``event_time``, and further columns, which are kept.
        seed: any integer.

    Returns:
        The sorted rows and two columns, both counted for each user from 0: ``step`` and ``position``, int32.
    """
    _require(interactions, USER, ITEM, EVENT_TIME)
    for name in (USER, ITEM):
        if interactions.column(name).null_count:
            raise DataError(f"{name}: expected no nulls, got {interactions.column(name).null_count}")
    ties = [ITEM, EVENT_TIME, *(name for name in (INGEST_SEQ,) if name in interactions.column_names)]
    keys = from_arrow(interactions.select([USER, *ties])).with_columns(
        pl.Series("second", _whole_seconds(interactions.column(EVENT_TIME)), pl.Int64),
        pl.Series("hash", _event_hash(interactions, seed), pl.UInt64),
        pl.Series("row", np.arange(interactions.num_rows), pl.Int64),
    )
    ordered = keys.sort(USER, "second", "hash", *ties, maintain_order=True)
    numbered = ordered.select(
        "row",
        pl.col("second").rle_id().over(USER).cast(pl.Int32).alias(STEP),
        pl.int_range(pl.len()).over(USER).cast(pl.Int32).alias(POSITION),
    )
    table = interactions.take(numbered["row"].to_arrow())
    for name in (STEP, POSITION):
        table = table.append_column(pa.field(name, pa.int32()), numbered[name].to_arrow())
    return table


def evaluation_segments(ordered: pa.Table, split: TimeSplit) -> dict[str, NDArray[np.bool_]]:
    """The test events, and two kinds of them that a mean over all would hide.

    Args:
        ordered: all events, those of training and validation too, as `order_events` numbers them.
        split: where testing starts.

    Returns:
        Masks over the rows of ``split.parts(ordered)["test"]``: ``all``; ``established``, where the user has at least
        `ESTABLISHED_EVENTS` events, in whichever part, before the event's step; ``new``, where the user was first seen in the test
        period.
    """
    _require(ordered, USER, EVENT_TIME, STEP, POSITION)
    frame = from_arrow(ordered.select([USER, STEP, POSITION])).with_columns(
        pl.Series("time", _micros(ordered.column(EVENT_TIME)), pl.Int64)
    )
    test_start = int(split.test_start.timestamp()) * _SECOND
    seen = frame.select("time", earlier=pl.col(POSITION).min().over(USER, STEP), first_time=pl.col("time").min().over(USER))
    tested = seen.filter(pl.col("time") >= test_start)
    return {
        "all": np.ones(tested.height, dtype=bool),
        "established": tested["earlier"].to_numpy() >= ESTABLISHED_EVENTS,
        "new": tested["first_time"].to_numpy() >= test_start,
    }


def leave_one_out(ordered: pa.Table) -> dict[str, pa.Table]:
    """LEAKY: the last event of each user tests, the one before validates, the others train.

    Much of the literature reports this split, and it is here to compare with it. It leaks the future: the training events of one user
    happen after the test events of another, so that a model knows what became popular later. A user with a single event is only
    tested, one with two is never trained on. The last events of a user may share a step; a history must end before the step of its target.

    Args:
        ordered: the events as `order_events` numbers them.

    Returns:
        ``train``, ``valid`` and ``test``, each in the order of ``ordered``.
    """
    _require(ordered, USER, POSITION)
    frame = from_arrow(ordered.select([USER, POSITION]))
    from_end = frame.select(pl.col(POSITION).max().over(USER) - pl.col(POSITION)).to_series().to_numpy()
    masks = (from_end >= 2, from_end == 1, from_end == 0)
    return {name: ordered.filter(pa.array(mask)) for name, mask in zip(PARTS, masks, strict=True)}


def _event_hash(interactions: pa.Table, seed: int) -> NDArray[np.uint64]:
    """A 64-bit hash of (seed, user, item, time) for each row, the same on every machine and in every version of our libraries."""
    mixed = _text_hash(interactions.column(USER), f"user {seed}")
    mixed = _mix(mixed ^ _text_hash(interactions.column(ITEM), f"item {seed}"))
    return _mix(mixed + _micros(interactions.column(EVENT_TIME)).view(np.uint64))


def _text_hash(column: pa.ChunkedArray, key: str) -> NDArray[np.uint64]:
    """BLAKE2b of each text, computed once for each distinct one."""
    encoded = column.dictionary_encode().combine_chunks()
    prefix = hashlib.blake2b(key.encode(), digest_size=8)
    hashes = np.empty(len(encoded.dictionary), dtype=np.uint64)
    for row, text in enumerate(encoded.dictionary.to_pylist()):
        state = prefix.copy()
        state.update(text.encode())
        hashes[row] = int.from_bytes(state.digest(), "little")
    by_row: NDArray[np.uint64] = hashes[encoded.indices.to_numpy()]
    return by_row


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _micros(event_time: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    if event_time.null_count:
        raise DataError(f"{EVENT_TIME}: expected no nulls, got {event_time.null_count}")
    if event_time.type != TIME:
        raise SchemaError(f"{EVENT_TIME}: expected {TIME}, got {event_time.type}")
    micros: NDArray[np.int64] = event_time.cast(pa.int64()).to_numpy()
    return micros


def _whole_seconds(event_time: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    return _micros(event_time) // _SECOND


def _require(table: pa.Table, *columns: str) -> None:
    for column in columns:
        if column not in table.column_names:
            raise SchemaError(f"events: {unknown('column', column, table.column_names)}")
