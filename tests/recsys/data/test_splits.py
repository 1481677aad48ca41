# SPDX-License-Identifier: Apache-2.0
"""Splits and order, against brute force in plain Python."""

import random
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core.errors import DataError, SchemaError
from recsys.core.schema import TIME
from recsys.data.splits import TimeSplit, _mix, evaluation_segments, global_time_split, leave_one_out, order_events

SECOND = 1_000_000
START = 880_000_000 * SECOND


def times(micros: list[int]) -> pa.Array:
    return pa.array(micros, pa.int64()).cast(TIME)


def events(rows: list[tuple[str, str, int]]) -> pa.Table:
    """Events (user, item, microseconds after START), with the arrival as ingest_seq."""
    users, items, micros = zip(*rows, strict=True) if rows else ((), (), ())
    columns = {"user_id": pa.array(users, pa.string()), "item_id": pa.array(items, pa.string())}
    return pa.table(columns | {"event_time": times([START + m for m in micros]), "ingest_seq": pa.array(range(len(rows)), pa.int64())})


def instant(micros: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)


event_rows = st.lists(
    st.tuples(st.sampled_from(["u1", "u10", "u2", "ü"]), st.sampled_from(["a", "b", "c", "d"]), st.integers(0, 12 * SECOND)),
    min_size=1,
    max_size=60,
    unique=True,
)
seconds_lists = st.lists(st.integers(-5, 40), min_size=3, max_size=80).filter(lambda seconds: len(set(seconds)) >= 3)


@settings(max_examples=80, deadline=None)
@given(seconds_lists, st.floats(0.01, 0.49), st.floats(0.01, 0.49), st.randoms())
def test_split_is_the_nearest_of_all_whole_seconds(seconds: list[int], valid: float, test: float, rng: random.Random) -> None:
    micros = [s * SECOND + rng.randrange(SECOND) for s in seconds]
    split = global_time_split(times(micros), valid, test)
    # Every whole second, also one without events, may part the time line, so long as no part is empty.
    n, candidates = len(seconds), range(min(seconds) + 1, max(seconds) + 1)
    test_errors = {t: abs(sum(s >= t for s in seconds) - test * n) for t in candidates if len({s for s in seconds if s < t}) >= 2}
    test_start = int(split.test_start.timestamp())
    assert test_errors[test_start] == pytest.approx(min(test_errors.values()))
    valid_errors = {
        v: abs(sum(v <= s < test_start for s in seconds) - valid * n) for v in candidates if any(v <= s < test_start for s in seconds)
    }
    assert valid_errors[int(split.valid_start.timestamp())] == pytest.approx(min(valid_errors.values()))


@settings(max_examples=50, deadline=None)
@given(seconds_lists, st.floats(0.05, 0.4), st.floats(0.05, 0.4), st.randoms())
def test_parts_are_apart_in_time_and_lose_nothing(seconds: list[int], valid: float, test: float, rng: random.Random) -> None:
    micros = [s * SECOND + rng.randrange(SECOND) for s in seconds]
    table = pa.table({"event_time": times(micros), "row": range(len(micros))})
    split = global_time_split(table.column("event_time"), valid, test)
    parts = {name: part.to_pylist() for name, part in split.parts(table).items()}
    assert list(parts) == ["train", "valid", "test"] and all(parts.values())
    assert max(r["event_time"] for r in parts["train"]) < split.valid_start <= min(r["event_time"] for r in parts["valid"])
    assert max(r["event_time"] for r in parts["valid"]) < split.test_start <= min(r["event_time"] for r in parts["test"])
    assert sorted(r["row"] for part in parts.values() for r in part) == list(range(len(micros)))
    for part in parts.values():
        assert [r["row"] for r in part] == sorted(r["row"] for r in part)
    owner = {micros[r["row"]] // SECOND: name for name, part in parts.items() for r in part}
    assert all(owner[micros[r["row"]] // SECOND] == name for name, part in parts.items() for r in part)


def test_split_meets_round_fractions_exactly() -> None:
    split = global_time_split(times([s * SECOND for s in range(100)]), 0.1, 0.2)
    assert split == TimeSplit(instant(70 * SECOND), instant(80 * SECOND))


def test_a_part_of_a_table_may_be_empty() -> None:
    parts = TimeSplit(instant(5 * SECOND), instant(6 * SECOND)).parts(pa.table({"event_time": times([1, 2])}))
    assert {name: part.num_rows for name, part in parts.items()} == {"train": 2, "valid": 0, "test": 0}


@pytest.mark.parametrize(
    ("micros", "valid", "test", "message"),
    [
        ([5, 6, 7], 0.1, 0.1, "at least 3 different seconds, got 1"),
        ([0, SECOND, SECOND + 1], 0.1, 0.1, "at least 3 different seconds, got 2"),
        ([], 0.1, 0.1, "got 0"),
        ([0, SECOND, 2 * SECOND], 0.5, 0.5, "valid=0.5 and test=0.5"),
        ([0, SECOND, 2 * SECOND], 0.0, 0.1, "valid=0.0"),
        ([0, SECOND, 2 * SECOND], float("nan"), 0.1, "valid=nan"),
    ],
)
def test_split_refuses(micros: list[int], valid: float, test: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        global_time_split(times(micros), valid, test)


def test_split_refuses_nulls_and_other_types() -> None:
    with pytest.raises(DataError, match="event_time: expected no nulls, got 1"):
        global_time_split(pa.array([None, 1], pa.int64()).cast(TIME), 0.1, 0.1)
    with pytest.raises(SchemaError, match=r"expected timestamp\[us, tz=UTC\], got timestamp\[s\]"):
        global_time_split(pa.array([1, 2, 3], pa.timestamp("s")), 0.1, 0.1)
    with pytest.raises(DataError, match="expected no nulls, got 1"):
        TimeSplit(instant(0), instant(SECOND)).parts(pa.table({"event_time": pa.array([None], TIME)}))


@pytest.mark.parametrize(
    ("valid_start", "test_start", "message"),
    [
        (datetime(2020, 1, 1), datetime(2020, 1, 2, tzinfo=UTC), "valid_start: expected a whole second with an offset"),
        (datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 1, 2, 0, 0, 0, 5, tzinfo=UTC), "test_start: expected a whole second"),
        (datetime(2020, 1, 2, tzinfo=UTC), datetime(2020, 1, 2, tzinfo=UTC), "must lie before test_start"),
    ],
)
def test_time_split_checks_its_instants(valid_start: datetime, test_start: datetime, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TimeSplit(valid_start, test_start)


def test_time_split_is_in_utc() -> None:
    abroad = datetime(2020, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))
    split = TimeSplit(abroad, datetime(2020, 1, 2, tzinfo=UTC))
    assert split.valid_start.isoformat() == "2020-01-01T00:00:00+00:00"


@settings(max_examples=50, deadline=None)
@given(event_rows, st.integers(-(2**70), 2**70), st.randoms())
def test_order_steps_and_positions(rows: list[tuple[str, str, int]], seed: int, rng: random.Random) -> None:
    ordered = order_events(events(rows), seed)
    assert ordered.schema.field("step").type == ordered.schema.field("position").type == pa.int32()
    got = ordered.to_pylist()
    assert [(r["user_id"], r["event_time"].replace(microsecond=0)) for r in got] == sorted(
        (u, instant(START + m).replace(microsecond=0)) for u, _, m in rows
    )
    assert Counter(r["ingest_seq"] for r in got) == Counter(range(len(rows)))
    for user in {u for u, _, _ in rows}:
        mine = [r for r in got if r["user_id"] == user]
        seconds = sorted({r["event_time"].replace(microsecond=0) for r in mine})
        assert [r["position"] for r in mine] == list(range(len(mine)))
        assert [r["step"] for r in mine] == [seconds.index(r["event_time"].replace(microsecond=0)) for r in mine]

    # Neither the order of the rows, nor how the table is chunked, nor the arrival matters.
    shuffled = rows.copy()
    rng.shuffle(shuffled)
    half = len(rows) // 2
    again = order_events(pa.concat_tables([events(shuffled[:half]), events(shuffled[half:])]), seed)
    columns = ["user_id", "item_id", "event_time", "step", "position"]
    assert again.select(columns).equals(ordered.select(columns))


def test_the_order_inside_a_second_is_the_seeds_and_only_that() -> None:
    rows = [("u", f"i{n:03}", n // 100) for n in range(100)] + [("u", f"j{n}", (n + 1) * SECOND) for n in range(5)]
    orders = [order_events(events(rows), seed).column("item_id").to_pylist() for seed in (1, 2)]
    for order in orders:
        assert sorted(order[:100]) == [f"i{n:03}" for n in range(100)] != order[:100]
        assert order[100:] == [f"j{n}" for n in range(5)]
    assert orders[0] != orders[1]
    # Another user has another order of the same items.
    other = order_events(events([("v", i, m) for _, i, m in rows]), 1).column("item_id").to_pylist()
    assert other[:100] != orders[0][:100]


def test_the_order_inside_a_second_is_even() -> None:
    """Each of the 6 orders of three items comes about as often; 6,000 users, 5 degrees of freedom, chi-squared below its 99.99% point."""
    rows = [(f"u{n}", item, 0) for n in range(6000) for item in "abc"]
    ordered = order_events(events(rows), 7).column("item_id").to_pylist()
    counts = Counter("".join(ordered[n : n + 3]) for n in range(0, len(ordered), 3))
    assert len(counts) == 6
    assert sum((c - 1000) ** 2 / 1000 for c in counts.values()) < 25.7


def test_events_alike_in_all_but_their_arrival_follow_it() -> None:
    table = events([("u", "a", 0), ("u", "a", 0), ("u", "a", 0)])
    assert order_events(table.take(pa.array([2, 0, 1])), 3).column("ingest_seq").to_pylist() == [0, 1, 2]


def test_splitmix64() -> None:
    """The first outputs of SplitMix64 seeded with 1234567, as its author's C code prints them."""
    gamma = 0x9E3779B97F4A7C15
    states = np.array([1234567, (1234567 + gamma) % 2**64, (1234567 + 2 * gamma) % 2**64], dtype=np.uint64)
    assert _mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_order_of_no_events_and_of_foreign_tables() -> None:
    empty = pa.table(
        {name: pa.chunked_array([], kind) for name, kind in (("user_id", pa.string()), ("item_id", pa.string()), ("event_time", TIME))}
    )
    assert order_events(empty, 0).column_names == ["user_id", "item_id", "event_time", "step", "position"]
    with pytest.raises(SchemaError, match="unknown column 'item_id'; did you mean 'item'"):
        order_events(empty.rename_columns(["user_id", "item", "event_time"]), 0)
    with pytest.raises(DataError, match="user_id: expected no nulls, got 1"):
        order_events(pa.table({"user_id": pa.array([None], pa.string()), "item_id": ["a"], "event_time": times([1])}), 0)


def segments_by_hand(ordered: list[dict[str, Any]], test_start: datetime) -> dict[str, list[bool]]:
    tested = [r for r in ordered if r["event_time"] >= test_start]

    def earlier(row: dict[str, Any]) -> int:
        second = row["event_time"].replace(microsecond=0)
        return sum(r["user_id"] == row["user_id"] and r["event_time"].replace(microsecond=0) < second for r in ordered)

    def is_new(row: dict[str, Any]) -> bool:
        return all(r["event_time"] >= test_start for r in ordered if r["user_id"] == row["user_id"])

    return {"all": [True] * len(tested), "established": [earlier(r) >= 5 for r in tested], "new": [is_new(r) for r in tested]}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**32))
def test_segments(test_second: int, seed: int) -> None:
    # Few users and seconds, so that the bound of 5 events often falls between two steps, and inside one.
    rng = random.Random(seed)
    rows = [(f"u{rng.randrange(6)}", f"i{n}", rng.randrange(5 * SECOND)) for n in range(rng.randrange(5, 45))]
    ordered = order_events(events(rows), 0)
    split = TimeSplit(instant(START), instant(START + test_second * SECOND))
    masks = evaluation_segments(ordered, split)
    assert {name: mask.tolist() for name, mask in masks.items()} == segments_by_hand(ordered.to_pylist(), split.test_start)
    tested = split.parts(ordered)["test"]
    assert all(len(mask) == tested.num_rows for mask in masks.values())


def test_segments_need_ordered_events() -> None:
    with pytest.raises(SchemaError, match="unknown column 'step'"):
        evaluation_segments(events([("u", "a", 0)]), TimeSplit(instant(0), instant(SECOND)))


@settings(max_examples=50, deadline=None)
@given(event_rows)
def test_leave_one_out(rows: list[tuple[str, str, int]]) -> None:
    ordered = order_events(events(rows), 0)
    parts = leave_one_out(ordered)
    want: dict[str, list[dict[str, Any]]] = {"train": [], "valid": [], "test": []}
    by_user: dict[str, list[dict[str, Any]]] = {}
    for row in ordered.to_pylist():
        by_user.setdefault(row["user_id"], []).append(row)
    for mine in by_user.values():
        want["train"] += mine[:-2]
        want["valid"] += mine[-2:-1]
        want["test"] += mine[-1:]
    assert {name: part.to_pylist() for name, part in parts.items()} == want


def test_leave_one_out_says_that_it_leaks() -> None:
    assert "LEAKY" in str(leave_one_out.__doc__)
