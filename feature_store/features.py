# SPDX-License-Identifier: Apache-2.0
"""The closed set of feature kinds. A feature is data: it names columns and numbers, never code.

Every kind is a function of the *counted* events of one entity at the request time t: those with ``event_time <= t`` and
``available_time <= t``, ordered by (``event_time``, ``ingest_seq``). A window of w seconds keeps the events with ``event_time`` in
(t − w, t]. A static source counts as one event per entity that has always been known. A source of kind ``request`` has no events: its
features are functions of the request's row, see `feature_store.request`. In a view with tiles a window begins where a tile does, see
`feature_store.tiles`.
"""

import math
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Field, FiniteFloat, PositiveInt, SerializerFunctionWrapHandler, model_serializer

from recsys.core.config import Config, Problem, by_kind
from recsys.core.schema import Column, Dtype, Kind

Name: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
ColumnName: TypeAlias = Annotated[str, Field(min_length=1)]


class Condition(Config):
    """``column op value``, such as ``rating >= 4``. A null value of the column never matches."""

    column: ColumnName
    op: Literal["==", "!=", "<", "<=", ">", ">="]
    value: FiniteFloat | str


class Attribute(Config):
    """The value of a column: of the entity's row in a static source, of its newest event in an event source, of the request's row.

    Status: MISSING without a row or event, or where the request has no such column; NULL where the value is null.

    Attributes:
        type: what the column means to a model.
        dtype: its values' type, or its elements' in a bag or sequence; by default it follows ``type``.
    """

    kind: Literal["attribute"] = "attribute"
    name: Name
    column: ColumnName
    type: Literal[Kind.CATEGORICAL, Kind.BAG, Kind.SEQUENCE, Kind.DENSE, Kind.TEXT]
    dtype: Dtype | None = None

    @property
    def output(self) -> Column:
        """The column that it becomes."""
        return Column(name=self.name, kind=self.type, dtype=self.dtype)


class Aggregate(Config):
    """What is computed over the events of a window that meet every condition.

    Attributes:
        invertible: whether what an event added can be taken away again; where it cannot, states can only be merged.
        window: seconds; all of the past by default.
        where: conditions, all of which must hold.
    """

    invertible: ClassVar[bool] = True

    name: Name
    window: PositiveInt | None = None
    where: tuple[Condition, ...] = ()


class Count(Aggregate):
    """How many events there are. An entity without events has the count 0, PRESENT."""

    kind: Literal["count"] = "count"

    @property
    def output(self) -> Column:
        """The column that it becomes."""
        return Column(name=self.name, kind=Kind.DENSE, dtype=Dtype.INT)


class Sum(Aggregate):
    """The sum of a column's values; nulls are left out, and a sum of nothing is 0, PRESENT."""

    kind: Literal["sum"] = "sum"
    column: ColumnName

    @property
    def output(self) -> Column:
        """The column that it becomes."""
        return Column(name=self.name, kind=Kind.DENSE)


class Mean(Aggregate):
    """The mean of a column's values; nulls are left out. Status: MISSING without any event, NULL where no value is left to average."""

    kind: Literal["mean"] = "mean"
    column: ColumnName

    @property
    def output(self) -> Column:
        """The column that it becomes."""
        return Column(name=self.name, kind=Kind.DENSE)


class _Extreme(Aggregate):
    invertible: ClassVar[bool] = False

    column: ColumnName

    @property
    def output(self) -> Column:
        """The column that it becomes."""
        return Column(name=self.name, kind=Kind.DENSE)


class Min(_Extreme):
    """The smallest of a column's values, of a view with tiles. Status: MISSING without any event, NULL where the window has no value."""

    kind: Literal["min"] = "min"


class Max(_Extreme):
    """The greatest of a column's values, of a view with tiles. Status: MISSING without any event, NULL where the window has no value."""

    kind: Literal["max"] = "max"


class Distinct(Aggregate):
    """About how many distinct values a column has, of a view with tiles; nulls are left out, and of nothing there are 0, PRESENT.

    Attributes:
        dtype: of the values.
        precision: p of the HyperLogLog sketch, which has ``2**p`` registers.
    """

    invertible: ClassVar[bool] = False

    kind: Literal["distinct"] = "distinct"
    column: ColumnName
    dtype: Literal[Dtype.STRING, Dtype.INT] = Dtype.STRING
    precision: int = Field(12, ge=4, le=16)

    @property
    def output(self) -> Column:
        """The column that it becomes."""
        return Column(name=self.name, kind=Kind.DENSE, dtype=Dtype.INT)

    @property
    def error(self) -> float:
        """The standard error of the count, relative to it."""
        return 1.04 / math.sqrt(1 << self.precision)


class Quantile(Aggregate):
    """About the smallest of a column's values that at least the share ``q`` does not exceed, of a view with tiles.

    Exact while the window has no more than ``size`` values. Status: MISSING without any event, NULL where the window has no value.

    Attributes:
        q: 0.5 is the median.
        size: how many events the sample holds.
    """

    invertible: ClassVar[bool] = False

    kind: Literal["quantile"] = "quantile"
    column: ColumnName
    q: FiniteFloat = Field(ge=0, le=1)
    size: int = Field(1024, ge=16, le=1 << 16)

    @property
    def output(self) -> Column:
        """The column that it becomes."""
        return Column(name=self.name, kind=Kind.DENSE)

    @property
    def error(self) -> float:
        """How far the rank of the answer is from ``q``, as a share of the values, in at least 99 of 100 cases (Hoeffding, 1963)."""
        return math.sqrt(math.log(2 / 0.01) / (2 * self.size))


class LastN(Config):
    """The values of a column in the last ``n`` events, oldest first, nulls in their places. Status: MISSING without any event.

    The ``last_n`` and ``elapsed`` features of one view that share ``n`` are aligned.

    Attributes:
        tokenizer: the fingerprint of the item tokenizer whose codes the column holds; none by default.
    """

    kind: Literal["last_n"] = "last_n"
    name: Name
    column: ColumnName
    n: PositiveInt
    dtype: Dtype = Dtype.STRING
    tokenizer: Annotated[str, Field(min_length=1)] | None = None

    @property
    def output(self) -> Column:
        """The column that it becomes."""
        return Column(name=self.name, kind=Kind.SEQUENCE, dtype=self.dtype)

    @model_serializer(mode="wrap")
    def _without_no_tokenizer(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Versions are hashes of what this gives: those from before there was ``tokenizer`` stay what they are."""
        return {key: value for key, value in dump(self).items() if key != "tokenizer" or value is not None}


class Elapsed(Config):
    """The seconds from each of the last ``n`` events to the request, aligned with `LastN`. Status: MISSING without any event."""

    kind: Literal["elapsed"] = "elapsed"
    name: Name
    n: PositiveInt

    @property
    def output(self) -> Column:
        """The column that it becomes."""
        return Column(name=self.name, kind=Kind.SEQUENCE, dtype=Dtype.FLOAT)


class Age(Config):
    """The seconds from the last event to the request. Status: MISSING without any event."""

    kind: Literal["age"] = "age"
    name: Name

    @property
    def output(self) -> Column:
        """The column that it becomes."""
        return Column(name=self.name, kind=Kind.DENSE)


class Clock(Config):
    """Where the request's time stands in its day, week or year, UTC; of a source of kind ``request`` only.

    Status: MISSING without a ``request_time``.

    Attributes:
        unit: ``hour`` is 0 to 23, ``weekday`` 0 (Monday) to 6, ``month`` 1 to 12.
    """

    kind: Literal["clock"] = "clock"
    name: Name
    unit: Literal["hour", "weekday", "month"]

    @property
    def output(self) -> Column:
        """The column that it becomes."""
        return Column(name=self.name, kind=Kind.DENSE, dtype=Dtype.INT)


KINDS: dict[str, type[Config]] = {
    "attribute": Attribute,
    "count": Count,
    "sum": Sum,
    "mean": Mean,
    "min": Min,
    "max": Max,
    "distinct": Distinct,
    "quantile": Quantile,
    "last_n": LastN,
    "elapsed": Elapsed,
    "age": Age,
    "clock": Clock,
}


TILED_ONLY = (Min, Max, Distinct, Quantile)
"""Kinds that are made of tiles alone."""

AnyFeature: TypeAlias = Attribute | Count | Sum | Mean | Min | Max | Distinct | Quantile | LastN | Elapsed | Age | Clock
Feature: TypeAlias = Annotated[AnyFeature, BeforeValidator(by_kind(KINDS, "kind of feature"))]


def source_columns(features: tuple[AnyFeature, ...]) -> dict[str, Column]:
    """The columns that features read from their source, typed.

    ``attribute``, ``last_n`` and ``distinct`` declare the type. Other aggregates and conditions on numbers accept any number, conditions on
    strings a string.

    Raises:
        Problem: two features need one column as different types; names both.
    """
    columns: dict[str, Column] = {}
    reader: dict[str, str] = {}
    for feature in features:
        if isinstance(feature, Attribute):
            declared = Column(name=feature.column, kind=feature.type, dtype=feature.dtype)
        elif isinstance(feature, LastN | Distinct):
            declared = Column(name=feature.column, kind=Kind.CATEGORICAL, dtype=feature.dtype)
        else:
            continue
        first = columns.setdefault(declared.name, declared)
        reader.setdefault(declared.name, feature.name)
        if first.arrow != declared.arrow:
            raise _conflict(declared.name, reader[declared.name], str(first.arrow), feature.name, str(declared.arrow))
    for feature in features:
        for column, kind in _loose_uses(feature):
            first = columns.setdefault(column, Column(name=column, kind=kind))
            reader.setdefault(column, feature.name)
            wanted = ("string",) if kind is Kind.CATEGORICAL else ("double", "int64")
            if str(first.arrow) not in wanted:
                raise _conflict(column, reader[column], str(first.arrow), feature.name, wanted[0])
    return columns


def _loose_uses(feature: AnyFeature) -> list[tuple[str, Kind]]:
    """The columns that an aggregate reads, each as a number (DENSE) or a string (CATEGORICAL)."""
    if not isinstance(feature, Aggregate):
        return []
    values = [(feature.column, Kind.DENSE)] if isinstance(feature, Sum | Mean | Min | Max | Quantile) else []
    return values + [(c.column, Kind.CATEGORICAL if isinstance(c.value, str) else Kind.DENSE) for c in feature.where]


def _conflict(column: str, one: str, its_type: str, other: str, other_type: str) -> Problem:
    return Problem((), f"column {column!r} is read by {one!r} as {its_type} and by {other!r} as {other_type}; expected one type")
