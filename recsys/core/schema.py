# SPDX-License-Identifier: Apache-2.0
"""Typed columns: what a table of features holds, Arrow in and Arrow out."""

from enum import StrEnum
from functools import cached_property

import pyarrow as pa

from recsys.core.config import Config
from recsys.core.errors import SchemaError, unknown

USER, ITEM, EVENT_TIME, AVAILABLE_TIME, INGEST_SEQ, REQUEST_TIME = (
    "user_id",
    "item_id",
    "event_time",
    "available_time",
    "ingest_seq",
    "request_time",
)
TIME = pa.timestamp("us", tz="UTC")


class Kind(StrEnum):
    """What a column means to a model."""

    ID = "id"
    TIME = "time"
    CATEGORICAL = "categorical"
    BAG = "bag"  # an unordered set of categories, such as genres
    SEQUENCE = "sequence"  # an ordered list, oldest first, such as a history of item ids
    DENSE = "dense"
    TEXT = "text"
    LABEL = "label"


class Dtype(StrEnum):
    """The type of a value, or of a list's element."""

    STRING = "string"
    FLOAT = "float"
    INT = "int"
    TIMESTAMP = "timestamp"


_ARROW = {Dtype.STRING: pa.string(), Dtype.FLOAT: pa.float64(), Dtype.INT: pa.int64(), Dtype.TIMESTAMP: TIME}
_DEFAULT = {
    Kind.ID: Dtype.STRING,
    Kind.TIME: Dtype.TIMESTAMP,
    Kind.CATEGORICAL: Dtype.STRING,
    Kind.BAG: Dtype.STRING,
    Kind.SEQUENCE: Dtype.STRING,
    Kind.DENSE: Dtype.FLOAT,
    Kind.TEXT: Dtype.STRING,
    Kind.LABEL: Dtype.FLOAT,
}


class Column(Config):
    """One typed column. ``dtype`` is the value's type, or the element's in a bag or sequence; by default it follows the kind."""

    name: str
    kind: Kind
    dtype: Dtype | None = None

    @property
    def arrow(self) -> pa.DataType:
        """The Arrow type of the column."""
        value = _ARROW[self.dtype or _DEFAULT[self.kind]]
        return pa.list_(value) if self.kind in (Kind.BAG, Kind.SEQUENCE) else value


class FeatureSchema(Config):
    """An ordered set of typed columns."""

    columns: tuple[Column, ...]

    @cached_property
    def by_name(self) -> dict[str, Column]:
        """The columns by their names."""
        return {column.name: column for column in self.columns}

    def names(self, *kinds: Kind) -> tuple[str, ...]:
        """The names of the columns of these kinds, in order; of all columns where no kind is given."""
        return tuple(c.name for c in self.columns if not kinds or c.kind in kinds)

    def to_arrow(self) -> pa.Schema:
        """The Arrow schema."""
        return pa.schema([pa.field(c.name, c.arrow) for c in self.columns])

    def conform(self, table: pa.Table, *, what: str = "table") -> pa.Table:
        """``table`` with exactly these columns in this order, safely cast; further columns are dropped.

        Raises:
            SchemaError: a column is absent or there twice, or its type cannot be cast without loss.
        """
        arrays = []
        for column in self.columns:
            if column.name not in table.column_names:
                raise SchemaError(f"{what}: missing column: {unknown('column', column.name, table.column_names)}")
            if (count := table.column_names.count(column.name)) > 1:
                raise SchemaError(f"{what}: column {column.name!r}: expected it once, found it {count} times")
            values = table.column(column.name)
            try:
                arrays.append(values if values.type == column.arrow else values.cast(column.arrow))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise SchemaError(f"{what}: column {column.name!r}: expected {column.arrow}, got {values.type}: {error}") from None
        return pa.table(arrays, schema=self.to_arrow())
