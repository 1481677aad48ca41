# SPDX-License-Identifier: Apache-2.0
"""A data set in its canonical form, its fingerprint, and the account of what was done to bring it there."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core.config import Config
from recsys.core.files import canonical_json
from recsys.core.schema import Column, FeatureSchema
from recsys.data.dataset_schema import DatasetSchema

TableName = Literal["interactions", "items", "users"]
Action = Literal["dropped", "nulled", "filled", "added"]

# Rows hashed at a time: bounds the memory, and fixes where values are cut, however the table happens to be chunked.
_HASHED_ROWS = 1 << 16


class Treatment(Config):
    """One rule applied to one table: to how many rows, and up to three of them. Rows count from 0 in the order of the source."""

    table: TableName
    rule: str
    column: str | None = None
    action: Action
    count: int
    examples: tuple[str, ...] = ()


class TableCounts(Config):
    """How many rows were read from a source, and how many the data set holds."""

    table: TableName
    file: str
    read: int
    kept: int


class IngestReport(Config):
    """What was read, what was kept, and why the rest was not.

    For interactions ``read`` equals ``kept`` plus the counts that were dropped: a row is counted by the first rule that it breaks.
    """

    tables: tuple[TableCounts, ...]
    treatments: tuple[Treatment, ...]
    first_event: datetime
    last_event: datetime

    def count(self, table: TableName, rule: str) -> int:
        """How many rows of ``table`` met ``rule``; 0 where it was never met."""
        return sum(t.count for t in self.treatments if t.table == table and t.rule == rule)


@dataclass(frozen=True)
class Dataset:
    """Interactions, items and users with canonical columns (see ``docs/architecture.md``).

    Attributes:
        name: what the data set is called in reports.
        interactions: sorted by ``event_time``, then ``ingest_seq``; unique rows; every ``item_id`` is among the items.
        items: one row for each ``item_id``.
        users: one row for each ``user_id`` whose attributes are known, or None where no attributes are known of anyone.
        schema: the columns and where they came from.
        report: how the sources became these tables.
    """

    name: str
    interactions: pa.Table
    items: pa.Table
    users: pa.Table | None
    schema: DatasetSchema
    report: IngestReport

    def tables(self) -> dict[TableName, tuple[pa.Table, FeatureSchema]]:
        """The tables that are there, each with its canonical columns."""
        present: dict[TableName, tuple[pa.Table, FeatureSchema]] = {
            "interactions": (self.interactions, self.schema.interactions.features),
            "items": (self.items, self.schema.items.features),
        }
        if self.users is not None and self.schema.users is not None:
            present["users"] = (self.users, self.schema.users.features)
        return present

    def fingerprint(self) -> str:
        """The hexadecimal SHA-256 of the canonical columns and all values in their order.

        It does not depend on how the tables are chunked, nor on the form of the source: a CSV file and a Parquet file with the same
        rows give the same fingerprint.
        """
        digest = hashlib.sha256()
        for name, (table, columns) in self.tables().items():
            update_digest(digest, name, table, columns)
        return digest.hexdigest()


def update_digest(digest: "hashlib._Hash", name: str, table: pa.Table, columns: FeatureSchema) -> None:
    """Feed the canonical columns of a table and all its values in their order."""
    digest.update(canonical_json([name, table.num_rows, [_signature(column) for column in columns.columns]]))
    for column in columns.conform(table, what=name).columns:
        digest.update(_column_digest(column))


def _signature(column: Column) -> list[str]:
    # The name that Arrow gives to a list's elements differs between versions, and says nothing.
    value = column.arrow.value_type if pa.types.is_list(column.arrow) else column.arrow
    return [column.name, column.kind.value, str(value)]


def _column_digest(column: pa.ChunkedArray) -> bytes:
    digest = hashlib.sha256()
    for start in range(0, len(column), _HASHED_ROWS):
        _update(digest, pa.concat_arrays(column.slice(start, _HASHED_ROWS).chunks))
    return digest.digest()


def _update(digest: "hashlib._Hash", values: pa.Array) -> None:
    """Feed validity, lengths and values. What a buffer holds below a null, or outside a slice, does not count."""
    digest.update(np.packbits(values.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    present = values.drop_null()
    if pa.types.is_list(values.type):
        _update_numbers(digest, pc.list_value_length(present))
        _update(digest, present.flatten())
    elif pa.types.is_string(values.type):
        _update_numbers(digest, pc.binary_length(present))
        digest.update(_text_bytes(present))
    else:
        _update_numbers(digest, present.cast(pa.int64()) if pa.types.is_timestamp(values.type) else present)


def _update_numbers(digest: "hashlib._Hash", numbers: pa.Array) -> None:
    array = numbers.to_numpy(zero_copy_only=False)
    digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())


def _text_bytes(texts: pa.StringArray) -> bytes:
    """The bytes of all texts, one after another."""
    if len(texts) == 0:
        return b""
    offsets = np.frombuffer(texts.buffers()[1], dtype=np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return bytes(memoryview(texts.buffers()[2])[offsets[0] : offsets[-1]]) if offsets[-1] > offsets[0] else b""
