# SPDX-License-Identifier: Apache-2.0
"""From the types that files have to the canonical ones: what is cast, and what is refused."""

import math
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core.errors import SchemaError
from recsys.data.dataset_schema import SourceColumn, TimeUnit
from recsys.data.ingest import RawTable
from recsys.data.ingest.cast import to_text, to_times, to_values
from recsys.data.ingest.source import RawColumn


def column(values: list[Any], dtype: Any = None) -> RawColumn:
    return RawTable("f.csv", pl.DataFrame({"c": pl.Series(values, dtype=dtype, strict=False)})).column("items.x", "c")


def cast(values: list[Any], source_dtype: Any, options: dict[str, Any]) -> list[Any]:
    result: list[Any] = to_values(column(values, source_dtype), SourceColumn(name="x", **options)).values.to_list()
    return result


@pytest.mark.parametrize(
    ("values", "dtype", "want"),
    [
        ([1, None, -3], pl.Int16, ["1", None, "-3"]),
        ([2**64 - 1], pl.UInt64, ["18446744073709551615"]),
        ([1.0, math.nan, None, 2.0**53], pl.Float64, ["1", None, None, "9007199254740992"]),
        (["007", "", None, " a "], pl.String, ["007", None, None, " a "]),
        (["x", None], pl.Categorical, ["x", None]),
        ([1, None], pl.Decimal(9, 0), ["1", None]),
        ([True, False], pl.Boolean, ["true", "false"]),
        ([None, None], pl.Null, [None, None]),
    ],
)
def test_ids_become_text(values: list[Any], dtype: Any, want: list[Any]) -> None:
    assert to_text(column(values, dtype)).to_list() == want


@pytest.mark.parametrize(
    ("options", "values", "dtype", "want"),
    [
        ({"kind": "dense"}, [1, None, -3], pl.Int32, [1.0, None, -3.0]),
        ({"kind": "dense"}, [0.5, math.inf, math.nan], pl.Float32, [0.5, None, None]),
        ({"kind": "dense"}, ["1", " -2.5e1 ", "", "nan", "-inf"], pl.String, [1.0, -25.0, None, None, None]),
        ({"kind": "dense"}, [2**53], pl.Int64, [2.0**53]),
        ({"kind": "dense"}, ["1.25"], pl.Decimal(5, 2), [1.25]),
        ({"kind": "label"}, [True, None, False], pl.Boolean, [1.0, None, 0.0]),
        ({"kind": "dense", "dtype": "int"}, [1.0, math.nan, None], pl.Float64, [1, None, None]),
        ({"kind": "dense", "dtype": "int"}, ["3", "3.0", "inf", "9007199254740993"], pl.String, [3, 3, None, 9007199254740993]),
        ({"kind": "dense", "nulls": ["-1", "n/a"]}, ["-1", "n/a", "2"], pl.String, [None, None, 2.0]),
        ({"kind": "dense", "nulls": ["-1"]}, [-1, 2], pl.Int64, [None, 2.0]),
        ({"kind": "categorical"}, [3.0, None], pl.Float64, ["3", None]),
        ({"kind": "text"}, ["", "nan", None], pl.String, [None, "nan", None]),
        ({"kind": "bag", "separator": "|"}, ["a| b|a||", "", None], pl.String, [["a", "b"], None, None]),
        ({"kind": "bag", "separator": ", "}, ["a, b"], pl.String, [["a", "b"]]),
        ({"kind": "bag"}, [["a", None, "a", ""], [], None], pl.List(pl.String), [["a"], [], None]),
        ({"kind": "bag", "separator": "|"}, [["a|b"]], pl.List(pl.String), [["a|b"]]),
        ({"kind": "bag", "dtype": "int", "separator": " "}, ["2 1 2"], pl.String, [[2, 1]]),
        ({"kind": "bag"}, [None, None], pl.Null, [None, None]),
        ({"kind": "sequence"}, [[2, 1, 2]], pl.List(pl.Int8), [["2", "1", "2"]]),
        ({"kind": "sequence", "dtype": "float"}, [[1.5, math.nan], [], [2.0]], pl.List(pl.Float64), [[1.5], [], [2.0]]),
        ({"kind": "sequence"}, [["b", "a"]], pl.Array(pl.String, 2), [["b", "a"]]),
        ({"kind": "time", "unit": "ms"}, ["1500", "2.5", ""], pl.String, [1_500_000, 2_500, None]),
    ],
)
def test_values_are_cast(options: dict[str, Any], values: list[Any], dtype: Any, want: list[Any]) -> None:
    got = cast(values, dtype, options)
    if options["kind"] == "time":
        got = [None if v is None else round(v.timestamp() * 1e6) for v in got]
    assert got == want
    assert all(type(g) is type(w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("options", "values", "dtype", "message"),
    [
        ({"kind": "dense"}, ["1", "x"], None, "row 1 (counted from 0): expected a number, got 'x'"),
        (
            {"kind": "dense"},
            [1, 2**53 + 1],
            pl.Int64,
            "row 1 (counted from 0): expected a number of at most 2^53, exact in 64-bit floating point",
        ),
        ({"kind": "dense"}, [date(2020, 1, 1)], None, "expected numbers, got a column of type Date"),
        ({"kind": "dense", "dtype": "int"}, [None, 1.5], None, "row 1 (counted from 0): expected a whole number of 64 bits, got 1.5"),
        ({"kind": "dense", "dtype": "int"}, ["1.5"], None, "row 0 (counted from 0): expected a whole number of 64 bits, got '1.5'"),
        ({"kind": "dense", "dtype": "int"}, [2**63], pl.UInt64, "expected a whole number of 64 bits, got 9223372036854775808"),
        (
            {"kind": "dense", "dtype": "int"},
            ["1e400", "99999999999999999999"],
            None,
            "row 1 (counted from 0): expected a whole number of 64 bits",
        ),
        ({"kind": "categorical"}, [1.5], None, "expected text or a whole number, got 1.5"),
        ({"kind": "text"}, [b"x"], None, "expected text or a whole number, got a column of type Binary"),
        ({"kind": "text"}, [["x"]], None, "expected text or a whole number, got a column of type List(String)"),
        ({"kind": "bag"}, ["a|b"], None, "expected a list (for text, the schema needs a separator), got a column of type String"),
        ({"kind": "bag", "separator": "|"}, [1], None, "expected a list, got a column of type Int64"),
        (
            {"kind": "sequence", "dtype": "int"},
            [[1.0], [2.0, 2.5]],
            None,
            "row 1 (counted from 0): expected a whole number of 64 bits, got 2.5",
        ),
        ({"kind": "time", "unit": "s"}, ["soon"], None, "expected a time since 1970 in the unit 's', in the years 1 to 9999, got 'soon'"),
    ],
)
def test_values_that_do_not_fit_are_named(options: dict[str, Any], values: list[Any], dtype: Any, message: str) -> None:
    with pytest.raises(SchemaError) as raised:
        cast(values, dtype, options)
    assert str(raised.value).startswith("f.csv: items.x: column 'c'")
    assert message in str(raised.value)


offsets = st.one_of(st.none(), st.integers(-14 * 60, 14 * 60).map(lambda m: timezone(timedelta(minutes=m))))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29)), offsets, st.sampled_from("T ")), min_size=1, max_size=8))
def test_iso_times_against_the_standard_library(moments: list[tuple[datetime, timezone | None, str]]) -> None:
    texts = [moment.replace(tzinfo=zone).isoformat(sep=sep) for moment, zone, sep in moments]
    want = [
        datetime.fromisoformat(text).replace(tzinfo=zone or UTC).astimezone(UTC) for text, (_, zone, _) in zip(texts, moments, strict=True)
    ]
    assert to_times(column(texts), TimeUnit.ISO).to_list() == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("2020-02-29", "2020-02-29T00:00:00"),
        ("2020-02-29 10:00", "2020-02-29T10:00:00"),
        ("2020-02-29T10:00:01Z", "2020-02-29T10:00:01"),
        ("2020-02-29T10:00:01.123456000+0130", "2020-02-29T08:30:01.123456"),
        (" 2020-02-29T10:00:01.5 -02 ", "2020-02-29T12:00:01.500000"),
    ],
)
def test_forms_of_iso_times(text: str, want: str) -> None:
    assert to_times(column([text, None, ""]), TimeUnit.ISO).to_list() == [datetime.fromisoformat(want + "+00:00"), None, None]


@pytest.mark.parametrize(
    "text",
    [
        "2020-01-01 10:000",
        "2020-01-01 10:00:010",
        "2021-02-29",
        "2020-01-01T25:00:00",
        "2020-01-01T10",
        "20200101",
        "881250949",
        "2020-01-01T10:00:00.1234567",
        "x",
    ],
)
def test_other_texts_are_not_times(text: str) -> None:
    with pytest.raises(SchemaError, match=rf"row 1 \(counted from 0\): expected a timestamp, a date or ISO 8601 text.*got '{text}'"):
        to_times(column(["2020-01-01", text]), TimeUnit.ISO)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-62_135_596_800, 253_402_300_799), min_size=1, max_size=5),
    st.sampled_from([TimeUnit.SECONDS, TimeUnit.MILLISECONDS]),
)
def test_number_times_of_every_type_agree(numbers: list[int], unit: TimeUnit) -> None:
    per_unit = 1_000_000 if unit is TimeUnit.SECONDS else 1000
    for values in (numbers, [float(n) for n in numbers], [str(n) for n in numbers], [f"{n}.0" for n in numbers]):
        assert to_times(column(values), unit).to_physical().to_list() == [n * per_unit for n in numbers]


def test_fractions_of_seconds_are_rounded_to_microseconds() -> None:
    assert to_times(column([1234567890.123456, -0.5]), TimeUnit.SECONDS).to_physical().to_list() == [1234567890123456, -500_000]


def test_typed_times() -> None:
    utc = to_times(column([datetime(2020, 6, 1, 12)], pl.Datetime("ms", "Europe/Berlin")), TimeUnit.ISO)
    assert utc.dtype == pl.Datetime("us", "UTC")
    assert utc.to_list() == [datetime(2020, 6, 1, 12, tzinfo=UTC)]
    assert to_times(column([datetime(2020, 6, 1, 12)], pl.Datetime("ns")), TimeUnit.ISO).to_list() == [datetime(2020, 6, 1, 12, tzinfo=UTC)]
    assert to_times(column([date(1969, 12, 31)]), TimeUnit.ISO).to_list() == [datetime(1969, 12, 31, tzinfo=UTC)]


def test_typed_times_that_do_not_fit() -> None:
    with pytest.raises(SchemaError, match=r"expected numbers, got a column of type Datetime"):
        to_times(column([datetime(2020, 1, 1)]), TimeUnit.SECONDS)
    with pytest.raises(SchemaError, match=r"of numbers, the schema says the unit.*got a column of type Int64"):
        to_times(column([1]), TimeUnit.ISO)
    ticks, far = column([1577836800_000000001]), column([3_670_793])
    with pytest.raises(SchemaError, match=r"expected a time in whole microseconds, got 2020-01-01.00:00:00.000000001"):
        to_times(ticks.with_values(ticks.values.cast(pl.Datetime("ns"))), TimeUnit.ISO)
    with pytest.raises(SchemaError, match=r"in the years 1 to 9999 .* got \+12020-04-16"):
        to_times(far.with_values(far.values.cast(pl.Int32).cast(pl.Date)), TimeUnit.ISO)
    with pytest.raises(SchemaError, match=r"in the unit 's', in the years 1 to 9999, got 881250949000"):
        to_times(column([881250949, 881250949000]), TimeUnit.SECONDS)
