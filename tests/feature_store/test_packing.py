# SPDX-License-Identifier: Apache-2.0
"""Packed rows: what comes out is what went in, and damage is noticed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.online import FeatureStoreError
from feature_store.online.packing import pack, unpack

SCHEMA = pa.schema(
    [
        pa.field("event_time", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("number", pa.float64()),
        pa.field("count", pa.int64()),
        pa.field("text", pa.string()),
        pa.field("times", pa.list_(pa.timestamp("us", tz="UTC"))),
        pa.field("tags", pa.list_(pa.string())),
    ]
)
INT = st.integers(-(2**62), 2**62)
TEXT = st.text(max_size=5)
ROW = st.tuples(
    INT,
    st.none() | st.floats(allow_nan=False),
    st.none() | INT,
    st.none() | TEXT,
    st.none() | st.lists(st.none() | INT, max_size=3),
    st.none() | st.lists(st.none() | TEXT, max_size=3),
)


def _table(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def _offsets(entities: Sequence[Sequence[Any]]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(rows) for rows in entities], dtype=np.int64)])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(ROW, max_size=4), max_size=4))
def test_round_trip(entities: list[list[tuple[Any, ...]]]) -> None:
    table, offsets = _table([row for rows in entities for row in rows]), _offsets(entities)
    values = list(pack(table, offsets))
    unpacked, found = unpack(values, SCHEMA)
    unpacked.validate(full=True)
    assert unpacked.equals(table)
    assert found.tolist() == offsets.tolist()
    # An entity's bytes depend on its own rows only.
    for rows, value in zip(entities, values, strict=True):
        assert list(pack(_table(rows), _offsets([rows]))) == [value]
        assert unpack([value], SCHEMA)[0].equals(_table(rows))


def test_slices_pack_like_copies() -> None:
    rows = [(i, float(i), None if i % 2 else i, f"t{i}", [i] * (i % 3), None if i % 3 else [f"x{i}"]) for i in range(20)]
    whole = _table(rows)
    assert list(pack(whole.slice(7, 9), np.array([0, 4, 9]))) == list(pack(_table(rows[7:16]), np.array([0, 4, 9])))


def test_damage_is_noticed() -> None:
    value = next(pack(_table([(1, 0.5, 2, "abc", [1], ["de"])]), np.array([0, 1])))
    other = next(pack(_table([(1, 0.5, 2, "abc", [1], ["de"])]).select(["event_time", "text"]), np.array([0, 1])))
    width = 18  # the row count and 1 + 2 + 2 + 3 + 4 + 5 buffers
    lengths = bytearray(value)
    lengths[4 * (width - 1)] ^= 1  # the bytes of the last buffer
    for damaged in (value[:-1], value + b"\0", b"", value[:10], other, bytes(lengths), b"\2" + value[1:]):
        with pytest.raises(FeatureStoreError, match="does not hold the columns event_time, number"):
            unpack([value, damaged], SCHEMA)
