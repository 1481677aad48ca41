# SPDX-License-Identifier: Apache-2.0
"""Typed columns, and tables that conform to them or say why not; the status of a value."""

import datetime as dt

import pyarrow as pa
import pytest

from recsys.core.errors import SchemaError
from recsys.core.schema import TIME, Column, Dtype, FeatureSchema, Kind
from recsys.core.status import ValueStatus, status_column

SCHEMA = FeatureSchema(
    columns=(
        Column(name="user_id", kind=Kind.ID),
        Column(name="event_time", kind=Kind.TIME),
        Column(name="genres", kind=Kind.BAG),
        Column(name="history", kind=Kind.SEQUENCE, dtype=Dtype.INT),
        Column(name="price", kind=Kind.DENSE),
        Column(name="clicks", kind=Kind.DENSE, dtype=Dtype.INT),
    )
)


def table(**columns: pa.Array) -> pa.Table:
    time = dt.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=dt.UTC)
    good = {
        "user_id": pa.array(["a", None]),
        "event_time": pa.array([time, time], TIME),
        "genres": pa.array([["x"], []], pa.list_(pa.string())),
        "history": pa.array([[1, 2], None], pa.list_(pa.int64())),
        "price": pa.array([1.5, None], pa.float64()),
        "clicks": pa.array([1, 2], pa.int64()),
    }
    return pa.table({**good, **columns})


def test_every_kind_has_its_arrow_type() -> None:
    assert SCHEMA.to_arrow().types == [pa.string(), TIME, pa.list_(pa.string()), pa.list_(pa.int64()), pa.float64(), pa.int64()]
    assert all(Column(name="x", kind=kind).arrow is not None for kind in Kind)


def test_names_are_in_order_and_by_kind() -> None:
    assert SCHEMA.names() == ("user_id", "event_time", "genres", "history", "price", "clicks")
    assert SCHEMA.names(Kind.DENSE, Kind.ID) == ("user_id", "price", "clicks")
    assert SCHEMA.by_name["price"].kind is Kind.DENSE


def test_a_conforming_table_comes_back_with_its_columns_in_order_and_no_others() -> None:
    given = table(extra=pa.array([0, 0]))
    result = SCHEMA.conform(given.select(given.column_names[::-1]))
    assert result.schema.equals(SCHEMA.to_arrow())
    assert result.equals(table())


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("price", pa.array([1, 2], pa.int32()), pa.array([1.0, 2.0])),
        ("clicks", pa.array([1.0, None], pa.float32()), pa.array([1, None], pa.int64())),
        ("user_id", pa.array(["a", None], pa.large_string()), pa.array(["a", None])),
        ("user_id", pa.array(["a", "a"]).dictionary_encode(), pa.array(["a", "a"])),
        ("history", pa.array([[1], [2]], pa.list_(pa.int16())), pa.array([[1], [2]], pa.list_(pa.int64()))),
        ("event_time", pa.array([0, 1], pa.timestamp("s", tz="UTC")), pa.array([0, 1_000_000], TIME)),
    ],
)
def test_a_cast_without_loss_is_made(name: str, values: pa.Array, expected: pa.Array) -> None:
    assert SCHEMA.conform(table(**{name: values})).column(name).combine_chunks().equals(expected)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("clicks", pa.array([1.5, 2.0]), "column 'clicks': expected int64, got double: "),
        ("price", pa.array(["cheap", "dear"]), "column 'price': expected double, got string: "),
        ("event_time", pa.array([1, 2], pa.timestamp("ns", tz="UTC")), "column 'event_time': expected timestamp[us, tz=UTC]"),
        ("genres", pa.array(["x", "y"]), "column 'genres': expected list<"),
        ("clicks", pa.array([2**63, 1], pa.uint64()), "column 'clicks': expected int64, got uint64: "),
    ],
)
def test_a_cast_that_would_lose_something_is_refused(name: str, values: pa.Array, message: str) -> None:
    with pytest.raises(SchemaError) as caught:
        SCHEMA.conform(table(**{name: values}), what="events.parquet")
    assert str(caught.value).startswith(f"events.parquet: {message}")


def test_an_absent_column_names_the_nearest_one() -> None:
    given = table().rename_columns(["userid", *table().column_names[1:]])
    with pytest.raises(SchemaError, match=r"^items: missing column: unknown column 'user_id'; did you mean 'userid'\?"):
        SCHEMA.conform(given, what="items")


def test_a_column_that_is_there_twice_is_refused() -> None:
    twice = table().append_column("price", pa.array([0.0, 0.0]))
    with pytest.raises(SchemaError, match="column 'price': expected it once, found it 2 times"):
        SCHEMA.conform(twice)


def test_an_empty_table_conforms() -> None:
    assert SCHEMA.conform(table().slice(0, 0)).num_rows == 0


def test_value_status_is_a_closed_set_of_small_numbers() -> None:
    assert {status.name: status.value for status in ValueStatus} == {"PRESENT": 0, "NULL": 1, "MISSING": 2, "EXPIRED": 3, "ERROR": 4}
    assert pa.array(list(ValueStatus), pa.uint8()).to_pylist() == [0, 1, 2, 3, 4]
    assert ValueStatus(3) is ValueStatus.EXPIRED
    with pytest.raises(ValueError, match="5 is not a valid ValueStatus"):
        ValueStatus(5)
    assert status_column("price") == "price__status"
