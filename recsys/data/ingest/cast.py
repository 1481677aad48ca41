# SPDX-License-Identifier: Apache-2.0
"""From the types that files have to the canonical ones, without loss: what does not fit is an error with its row and value.

Three things are treated instead of refused: an empty text becomes null, so that CSV and Parquet agree; a value listed in ``nulls``
becomes null; and a number that is not finite becomes null, and is counted.
"""

from dataclasses import dataclass

import polars as pl

from recsys.core.schema import Dtype, Kind
from recsys.data.dataset_schema import SourceColumn, TimeUnit
from recsys.data.ingest.source import RawColumn

_EXACT = 1 << 53  # up to here every whole number is a float64
_MICROSECONDS = {TimeUnit.SECONDS: 1_000_000, TimeUnit.MILLISECONDS: 1_000, TimeUnit.MICROSECONDS: 1}
_DAY = 86_400_000_000  # microseconds
_YEAR_1, _YEAR_10000 = -62_135_596_800_000_000, 253_402_300_800_000_000  # in microseconds since 1970
_ISO = r"^(\d{4}-\d{2}-\d{2})(?:[T ](\d{2}:\d{2})(?:(:\d{2})(?:(\.\d{1,6})0*)?)? ?(?:Z|(?:([+-]\d{2}):?(\d{2})?))?)?$"
_EXPECTED_TIME = "a timestamp, a date or ISO 8601 text, in the years 1 to 9999 (of numbers, the schema says the unit: s, ms or us)"
_POLARS = {Dtype.STRING: pl.String(), Dtype.INT: pl.Int64(), Dtype.FLOAT: pl.Float64(), Dtype.TIMESTAMP: pl.Datetime("us", "UTC")}


@dataclass(frozen=True)
class Values:
    """Canonical values, row by row, and which rows lost a number that was not finite."""

    values: pl.Series
    non_finite: pl.Series


def to_values(raw: RawColumn, column: SourceColumn) -> Values:
    """Cast a source column to the type of ``column``.

    Raises:
        SchemaError: names file, role, column, row and value.
    """
    if column.nulls:
        raw = raw.with_values(_without(raw.values, column.nulls))
    if column.kind in (Kind.BAG, Kind.SEQUENCE):
        return _to_lists(raw, column)
    return _to_scalars(raw, column)


def to_text(raw: RawColumn) -> pl.Series:
    """Text, as ids are. A whole number becomes its digits, whatever type holds it; of anything else a `SchemaError` is raised."""
    values = raw.values
    if values.dtype in (pl.String, pl.Boolean, pl.Null) or values.dtype.is_integer():
        text = values.cast(pl.String)
        return _where(text, text != "")
    return _whole_numbers(raw, _finite(values), "text or a whole number").cast(pl.String)


def to_times(raw: RawColumn, unit: TimeUnit) -> pl.Series:
    """Timestamps in microseconds, UTC. A number with a fraction is rounded to the nearest microsecond.

    Raises:
        SchemaError: not a time of this unit, finer than a microsecond, or outside the years 1 to 9999.
    """
    if unit is TimeUnit.ISO:
        micros = _typed_micros(raw) if raw.values.dtype.is_temporal() else _text_micros(raw)
    else:
        expected = f"a time since 1970 in the unit {unit.value!r}, in the years 1 to 9999"
        micros = _scaled(raw, _numbers_or_text(raw), _MICROSECONDS[unit], expected)
    return micros.cast(_POLARS[Dtype.TIMESTAMP])


def _to_scalars(raw: RawColumn, column: SourceColumn) -> Values:
    match column.value_dtype:
        case Dtype.STRING:
            values = to_text(raw)
        case Dtype.INT:
            values = _whole_numbers(raw, _numbers_or_text(raw), "a whole number of 64 bits")
        case Dtype.FLOAT:
            values = _to_floats(raw)
        case Dtype.TIMESTAMP:
            values = to_times(raw, column.unit)
    return Values(values, _non_finite(raw.values, text_is_number=column.value_dtype in (Dtype.INT, Dtype.FLOAT)))


def _to_lists(raw: RawColumn, column: SourceColumn) -> Values:
    """Lists without null or empty elements and without white space around texts; a bag holds each element once.

    A null stays null, and an empty list empty.
    """
    values = raw.values
    if values.dtype == pl.Null:
        values = values.cast(pl.List(pl.String))
    elif values.dtype == pl.String and column.separator is not None:
        values = _where(values, values != "").str.split(column.separator)
    elif not isinstance(values.dtype, pl.List | pl.Array):
        raw.refuse_type("a list" if column.separator else "a list (for text, the schema needs a separator)")
    flat = pl.DataFrame({"row": raw.rows, "value": values}).explode("value").drop_nulls("value")
    if flat.schema["value"] == pl.String:
        flat = flat.with_columns(pl.col("value").str.strip_chars())
    elements = _to_scalars(raw.with_values(flat["value"], flat["row"]), column)
    kept = flat.select("row", elements.values.alias("value")).drop_nulls("value")
    if column.kind is Kind.BAG:
        kept = kept.unique(maintain_order=True)
    lists = kept.group_by("row", maintain_order=True).agg("value")
    joined = pl.DataFrame({"row": raw.rows, "known": values.is_not_null()}).join(lists, on="row", how="left", maintain_order="left")
    empty = pl.lit([], dtype=pl.List(_POLARS[column.value_dtype]))
    filled = joined.select(pl.when("known").then(pl.col("value").fill_null(empty))).to_series()
    return Values(filled, raw.rows.is_in(flat["row"].filter(elements.non_finite).unique().implode()))


def _to_floats(raw: RawColumn) -> pl.Series:
    values = _numbers_or_text(raw)
    numbers = _finite(values.cast(pl.Float64, strict=False))
    if values.dtype == pl.String:
        raw.refuse_where(values.is_not_null() & values.cast(pl.Float64, strict=False).is_null(), "a number")
    elif values.dtype.is_integer():
        exact = values.cast(pl.Int64, strict=False).is_between(-_EXACT, _EXACT)
        raw.refuse_where(values.is_not_null() & ~exact.fill_null(False), "a number of at most 2^53, exact in 64-bit floating point")
    return numbers


def _whole_numbers(raw: RawColumn, values: pl.Series, expected: str) -> pl.Series:
    """Int64 from whole numbers of any type, or from their text."""
    if values.dtype == pl.String:
        numbers, whole = values.cast(pl.Float64, strict=False), values.cast(pl.Int64, strict=False)
        raw.refuse_where(values.is_not_null() & numbers.is_null(), expected)
        rest = _whole_numbers(raw, _where(_finite(numbers), whole.is_null()), expected)
        return pl.select(pl.coalesce(whole, rest)).to_series()
    if values.dtype.is_float() or values.dtype.is_decimal():
        raw.refuse_where((values != values.round()) | (values.abs() > _EXACT), expected)
    elif not (values.dtype.is_integer() or values.dtype in (pl.Boolean, pl.Null)):
        raw.refuse_type(expected)
    whole = values.cast(pl.Int64, strict=False)
    raw.refuse_where(values.is_not_null() & whole.is_null(), expected)
    return whole


def _scaled(raw: RawColumn, values: pl.Series, per_unit: int, expected: str) -> pl.Series:
    """Int64 microseconds from numbers, or their text, in units of ``per_unit`` microseconds."""
    numbers = _finite(values.cast(pl.Float64, strict=False))
    raw.refuse_where(values.is_not_null() & values.cast(pl.Float64, strict=False).is_null(), expected)
    raw.refuse_where((numbers * per_unit < _YEAR_1) | (numbers * per_unit >= _YEAR_10000), expected)
    rounded = (numbers * per_unit).round().cast(pl.Int64)
    if values.dtype.is_float() or values.dtype.is_decimal():
        return rounded
    return pl.select(pl.coalesce(values.cast(pl.Int64, strict=False) * per_unit, rounded)).to_series()


def _typed_micros(raw: RawColumn) -> pl.Series:
    dtype, ticks = raw.values.dtype, raw.values.to_physical()
    if dtype == pl.Date:
        return _scaled(raw, ticks, _DAY, _EXPECTED_TIME)
    if not isinstance(dtype, pl.Datetime):
        raw.refuse_type(_EXPECTED_TIME)
    if dtype.time_unit == "ns":
        raw.refuse_where(ticks % 1000 != 0, "a time in whole microseconds")
        return ticks // 1000
    return _scaled(raw, ticks, _MICROSECONDS[TimeUnit(dtype.time_unit)], _EXPECTED_TIME)


def _text_micros(raw: RawColumn) -> pl.Series:
    if raw.values.dtype not in (pl.String, pl.Null):
        raw.refuse_type(_EXPECTED_TIME)
    text = raw.values.cast(pl.String).str.strip_chars()
    part = text.str.extract_groups(_ISO).struct.unnest()
    date, minute, second, fraction, zone_hours, zone_minutes = (pl.col(name) for name in part.columns)
    clock = pl.concat_str(minute.fill_null("00:00"), second.fill_null(":00"), fraction.fill_null(""))
    offset = pl.concat_str(zone_hours.fill_null("+00"), pl.lit(":"), zone_minutes.fill_null("00"))
    spelled = part.select(pl.concat_str(date, pl.lit("T"), clock, offset)).to_series()
    times = spelled.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%:z", time_unit="us", time_zone="UTC", strict=False)
    raw.refuse_where((text != "") & times.is_null(), _EXPECTED_TIME)
    return times.to_physical()


def _numbers_or_text(raw: RawColumn) -> pl.Series:
    """Numbers, or text without white space around it and with null for nothing."""
    values = raw.values
    if values.dtype == pl.String:
        text = values.str.strip_chars()
        return _where(text, text != "")
    if not (values.dtype.is_numeric() or values.dtype in (pl.Boolean, pl.Null)):
        raw.refuse_type("numbers")
    return _finite(values)


def _finite(values: pl.Series) -> pl.Series:
    return _where(values, values.is_finite()) if values.dtype.is_float() else values


def _non_finite(values: pl.Series, *, text_is_number: bool) -> pl.Series:
    if values.dtype == pl.String and text_is_number:
        values = values.str.strip_chars().cast(pl.Float64, strict=False)
    if not values.dtype.is_float():
        return pl.repeat(False, len(values), dtype=pl.Boolean, eager=True)
    return ~values.is_finite().fill_null(True)


def _without(values: pl.Series, nulls: tuple[str, ...]) -> pl.Series:
    if values.dtype == pl.String or values.dtype.is_numeric():
        return _where(values, ~values.cast(pl.String).is_in(list(nulls)))
    return values


def _where(values: pl.Series, keep: pl.Series) -> pl.Series:
    """The values, null where ``keep`` does not hold."""
    return values.to_frame("value").select(pl.when(keep).then("value")).to_series()
