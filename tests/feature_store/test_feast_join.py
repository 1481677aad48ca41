# SPDX-License-Identifier: Apache-2.0
"""The join that the adapter for Feast makes, without Feast: beside loops, at limits, and for keys that look alike."""

import random
from datetime import timedelta

import pyarrow as pa
import pytest

from feature_store.feast.join import join_key, newest_rows
from recsys.core.errors import ConfigError, DataError, SchemaError

US = pa.timestamp("us", tz="UTC")


def rows_of(keys, asked, row_keys, times, *, ttl=None, created=None, created_is_available=False, kind=US):
    return newest_rows(
        pa.array(keys, pa.string()),
        pa.array(asked, kind),
        pa.array(row_keys, pa.string()),
        pa.array(times, kind),
        ttl=ttl,
        created=None if created is None else pa.array(created, kind),
        created_is_available=created_is_available,
    ).to_pylist()


def by_loops(keys, asked, row_keys, times, created, ttl, available):
    answers = []
    for key, at in zip(keys, asked, strict=True):
        seen = [
            (times[i], created[i], i)
            for i in range(len(times))
            if row_keys[i] == key and times[i] <= at and (not available or created[i] <= at)
        ]
        newest = max(seen, default=None)
        answers.append(None if newest is None or at - newest[0] > ttl else newest[2])
    return answers


@pytest.mark.parametrize("available", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_newest_row_is_the_one_that_loops_find(seed: int, available: bool) -> None:
    rng = random.Random(seed)
    second = 1_000_000
    keys, asked = zip(*[(rng.choice("abcd"), rng.randrange(40) * second) for _ in range(300)], strict=True)
    row_keys, times, late = zip(
        *[(rng.choice("abc"), rng.randrange(30) * second, rng.choice([0, 0, 1, 9])) for _ in range(80)], strict=True
    )
    created = [time + second * some for time, some in zip(times, late, strict=True)]
    found = rows_of(keys, asked, row_keys, times, ttl=timedelta(seconds=7), created=created, created_is_available=available)
    assert found == by_loops(keys, asked, row_keys, times, created, 7 * second, available)
    assert None in found and len(set(found)) > 10


def test_of_equal_times_the_row_created_last_counts_then_the_last_in_the_table() -> None:
    assert rows_of(["a"], [5], ["a", "a", "a"], [1, 1, 1]) == [2]
    assert rows_of(["a"], [5], ["a", "a", "a"], [1, 1, 1], created=[4, 9, 2]) == [1]
    assert rows_of(["a"], [5], ["a", "a", "a"], [1, 1, 1], created=[9, 9, 2]) == [1]


def test_nanoseconds_are_rounded_so_that_no_row_counts_too_early() -> None:
    nanoseconds = pa.timestamp("ns")
    assert rows_of(["a", "a"], [2_500, 3_000], ["a"], [2_501], kind=nanoseconds) == [None, 0]
    assert rows_of(["a"], [2_500_000], ["a"], [1], kind=pa.timestamp("ms")) == [0]


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ConfigError, match=r"ttl: expected a positive whole number of seconds, got 0:00:01\.5"):
        rows_of(["a"], [1], ["a"], [1], ttl=timedelta(seconds=1.5))
    with pytest.raises(SchemaError, match="event time: expected timestamps, got int64"):
        rows_of(["a"], [1], ["a"], [1], kind=pa.int64())
    with pytest.raises(DataError, match="available_time"):
        rows_of(["a"], [1], ["a"], [1], created=[None], created_is_available=True)


def test_keys_of_several_columns_are_distinct_for_distinct_values() -> None:
    pairs = [("a|", "b"), ("a", "|b"), ("a\\", "|b"), ("a\\|", "b"), ("", "a|b"), ("a", "b")]
    columns = [pa.chunked_array([pa.array(part)]) for part in zip(*pairs, strict=True)]
    assert len(set(join_key(columns, len(pairs)).to_pylist())) == len(pairs)
    with_null = [pa.chunked_array([pa.array(["a", None])]), pa.chunked_array([pa.array([1, 2])])]
    assert join_key(with_null, 2).to_pylist() == ["a|1", None]
    assert join_key([], 2).to_pylist() == ["", ""]
