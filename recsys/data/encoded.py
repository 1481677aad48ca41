# SPDX-License-Identifier: Apache-2.0
"""Encoded rows: what an `Encoder` makes of raw values, kept by rows so that any batch of them is gathered at once; and the same as Parquet.

A ranker that trains for many epochs, or many rankers on the same rows, need not look strings up each time: `write_rows` writes the
table rows as integers, and `EncodedColumns` reads them back. A file's columns are the keys of the inputs, the dense columns and
the tasks: int32 or int64 (or lists of them) for keys, float32 for numbers, nothing null.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
import torch
from numpy.typing import DTypeLike
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core.errors import DataError, SchemaError, unknown
from recsys.core.files import new_file
from recsys.data.batch import RankingBatch
from recsys.data.jagged import Jagged, gather
from recsys.data.spec import InputSpec

GROUP_ROWS = 32_768


@dataclass(frozen=True)
class KeyedRows:
    """The ids of N rows under several keys.

    Attributes:
        keys: in the order of the batch.
        single: int32 or int64 ``[N, S]``: the ids of the S keys that have exactly one for each row, in the order of ``keys``.
        lists: the ids of the other keys.
    """

    keys: tuple[str, ...]
    single: Tensor
    lists: dict[str, Jagged]

    @classmethod
    def make(cls, keys: tuple[str, ...], columns: dict[str, np.ndarray | Jagged], rows: int, *, wide: bool) -> Self:
        """Of a column for each key: ids ``[N]``, or lists of them. ``wide`` keeps 64 bits of an id where 32 are enough for table rows."""
        kind: type[np.signedinteger] = np.int64 if wide else np.int32
        plain = [column for key in keys if not isinstance(column := columns[key], Jagged)]
        lists = {key: Jagged(c.values.astype(kind, copy=False), c.offsets) for key in keys if isinstance(c := columns[key], Jagged)}
        return cls(keys, matrix(plain, rows, kind), lists)

    def take(self, rows: np.ndarray) -> Self:
        """Only these rows, copied."""
        lists = {key: _take(column, rows) for key, column in self.lists.items()}
        return type(self)(self.keys, self.single.index_select(0, torch.from_numpy(rows)), lists)

    def concat(self, others: Sequence[Self]) -> Self:
        """These rows and then those of ``others``."""
        lists = {key: _concat([column, *(other.lists[key] for other in others)]) for key, column in self.lists.items()}
        return type(self)(self.keys, torch.cat([self.single, *(other.single for other in others)]), lists)

    def beside(self, other: Self, keys: tuple[str, ...]) -> Self:
        """The same rows under the keys of both, which have none in common, in the order of ``keys``."""
        lists = self.lists | other.lists
        plain = [key for key in (*self.keys, *other.keys) if key not in lists]
        places = [plain.index(key) for key in keys if key not in lists]
        return type(self)(keys, torch.cat([self.single, other.single], dim=1)[:, places], {key: lists[key] for key in keys if key in lists})

    def extended(self, rows: int) -> Self:
        """These N rows and empty ones behind them, ``rows`` in all: so every key has lists."""
        kept = np.minimum(np.arange(rows + 1), len(self.single))
        ids = self.single.T.contiguous().numpy()
        column = 0
        lists: dict[str, Jagged] = {}
        for key in self.keys:
            if key in self.lists:
                found = self.lists[key]
                lists[key] = Jagged(found.values, found.offsets[kept])
            else:
                lists[key] = Jagged(ids[column], kept)
                column += 1
        return type(self)(self.keys, self.single.new_empty(rows, 0), lists)

    def keyed(self) -> KeyedJaggedTensor:
        """All rows: int64 values and int32 lengths, one key after another."""
        rows, single = self.single.shape
        values = torch.empty(rows * single + sum(len(column.values) for column in self.lists.values()), dtype=torch.int64)
        lengths = torch.ones(rows * len(self.keys), dtype=torch.int32)
        done = column = position = 0
        while position < len(self.keys):
            count = self._plain_from(position)
            if count:
                # A run of keys with one id each is a transposed part of a matrix.
                values[done : done + count * rows].view(count, rows).copy_(self.single[:, column : column + count].T)
                done, column, position = done + count * rows, column + count, position + count
                continue
            found = self.lists[self.keys[position]]
            values.numpy()[done : done + len(found.values)] = found.values
            lengths.numpy()[position * rows : (position + 1) * rows] = np.diff(found.offsets)
            done, position = done + len(found.values), position + 1
        return KeyedJaggedTensor(keys=list(self.keys), values=values, lengths=lengths, stride=rows)

    def _plain_from(self, position: int) -> int:
        """How many keys from ``position`` on have one id for each row, up to the next that has lists."""
        ends = (i for i in range(position, len(self.keys)) if self.keys[i] in self.lists)
        return next(ends, len(self.keys)) - position


@dataclass(frozen=True)
class EncodedRows:
    """N rows for a ranker, of which batches are made. See `RankingBatch` for what the fields hold.

    Attributes:
        sparse: the ids to be pooled.
        sequences: the ids to be looked up one by one.
        dense: float32 ``[N, D]``.
        labels: float32 ``[N, T]``, or None.
        weights: float32 ``[N]``, or None.
    """

    sparse: KeyedRows
    sequences: KeyedRows
    dense: Tensor
    labels: Tensor | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return int(self.dense.shape[0])

    def take(self, rows: np.ndarray) -> Self:
        """Only these rows, copied."""
        index = torch.from_numpy(rows)
        dense, labels, weights = (None if x is None else x.index_select(0, index) for x in (self.dense, self.labels, self.weights))
        assert dense is not None
        return type(self)(self.sparse.take(rows), self.sequences.take(rows), dense, labels, weights)

    def concat(self, others: Sequence[Self]) -> Self:
        """These rows and then those of ``others``, which have the same keys and columns.

        Raises:
            DataError: some have labels (or weights) and some have none.
        """
        if not others:
            return self
        return type(self)(
            self.sparse.concat([other.sparse for other in others]),
            self.sequences.concat([other.sequences for other in others]),
            torch.cat([self.dense, *(other.dense for other in others)]),
            _cat("labels", [self.labels, *(other.labels for other in others)]),
            _cat("weights", [self.weights, *(other.weights for other in others)]),
        )

    def batch(self) -> RankingBatch:
        """All rows as a batch."""
        return RankingBatch(self.sparse.keyed(), self.sequences.keyed(), self.dense, self.labels, self.weights)


def matrix(columns: Sequence[np.ndarray], rows: int, kind: DTypeLike) -> Tensor:
    """Columns ``[rows]`` beside each other, as numbers of another kind: ``[rows, len(columns)]``."""
    if not columns:
        return torch.from_numpy(np.empty((rows, 0), dtype=kind))
    return torch.from_numpy(np.stack(columns, axis=1, dtype=kind, casting="unsafe"))


class EncodedColumns:
    """Reads tables of encoded rows, which hold a column for each key, dense column and task; see this module.

    Args:
        spec: the inputs. Columns that it does not name are ignored.
    """

    def __init__(self, spec: InputSpec) -> None:
        self.spec = spec
        self._wide = is_wide(spec)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return (*self.spec.bag_keys, *self.spec.sequence_keys, *self.spec.dense, *self.spec.tasks)

    def rows(self, table: pa.Table) -> EncodedRows:
        """The rows of a table.

        Raises:
            SchemaError: a column is absent, of another type, or has nulls.
        """
        sparse, sequences = (
            KeyedRows.make(keys, {key: _ids(table, key) for key in keys}, table.num_rows, wide=self._wide)
            for keys in (self.spec.bag_keys, self.spec.sequence_keys)
        )
        return EncodedRows(sparse, sequences, _numbers(table, self.spec.dense), _numbers(table, self.spec.tasks))

    def transform(self, table: pa.Table) -> RankingBatch:
        """The rows of a table as a batch; the errors are those of `rows`."""
        return self.rows(table).batch()


def is_wide(spec: InputSpec) -> bool:
    """Whether an id takes 64 bits: raw ids do, and rows of a table of more than 2³¹."""
    return any(table.ids == "raw" or table.rows > np.iinfo(np.int32).max for table in spec.tables)


def write_rows(path: Path, spec: InputSpec, batches: Iterable[RankingBatch], *, lists: Collection[str]) -> None:
    """Write batches, which have labels, as one Parquet file that `EncodedColumns` reads.

    No column is optional, and bytes of equal weight stand together before LZ4: ids are read in half the time that pyarrow's defaults take,
    and the file is smaller than with dictionaries, which large vocabularies overflow.

    Args:
        path: replaced where it exists.
        spec: of the batches.
        batches: not none; their ids are table rows.
        lists: the keys that have any number of ids for a row (`Encoder.list_keys`); all others have one.

    Raises:
        DataError: a batch has no labels, a key outside ``lists`` has another number of ids than one for a row, or there is no batch.
    """
    wide = pa.int64() if is_wide(spec) else pa.int32()
    fields = [pa.field(key, pa.list_(pa.field("element", wide, False)) if key in lists else wide, False) for key in _keys(spec)]
    schema = pa.schema(fields + [pa.field(name, pa.float32(), False) for name in (*spec.dense, *spec.tasks)])
    written = 0
    with new_file(path) as temporary:
        with pq.ParquetWriter(temporary, schema, compression="lz4", use_dictionary=False, use_byte_stream_split=True) as writer:
            for table in _grouped(_table(batch, spec, schema) for batch in batches):
                writer.write_table(table, row_group_size=GROUP_ROWS)
                written += table.num_rows
        if not written:
            raise DataError(f"{path}: expected at least one batch to write, got none")


def _grouped(tables: Iterable[pa.Table]) -> Iterable[pa.Table]:
    """The same rows in tables of `GROUP_ROWS`, so that each becomes one row group."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(part.num_rows for part in waiting) >= GROUP_ROWS:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, whole.num_rows // GROUP_ROWS * GROUP_ROWS)
            waiting = [whole.slice(whole.num_rows // GROUP_ROWS * GROUP_ROWS)]
    if waiting and sum(part.num_rows for part in waiting):
        yield pa.concat_tables(waiting)


def _keys(spec: InputSpec) -> tuple[str, ...]:
    return (*spec.bag_keys, *spec.sequence_keys)


def _table(batch: RankingBatch, spec: InputSpec, schema: pa.Schema) -> pa.Table:
    if batch.labels is None:
        raise DataError("labels: an encoded row needs one")
    columns: list[pa.Array] = []
    for keys, found in ((spec.bag_keys, batch.sparse), (spec.sequence_keys, batch.sequences)):
        jagged = found.to_dict() if keys else {}
        columns += [_column(key, jagged[key].values().numpy(), jagged[key].lengths().numpy(), schema.field(key).type) for key in keys]
    columns += [pa.array(matrix[:, i].numpy(), pa.float32()) for matrix in (batch.dense, batch.labels) for i in range(matrix.shape[1])]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(key: str, values: np.ndarray, lengths: np.ndarray, kind: pa.DataType) -> pa.Array:
    if pt.is_list(kind):
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind.value_type), type=kind)
    if (lengths != 1).any():
        row = int(np.flatnonzero(lengths != 1)[0])
        raise DataError(f"key {key!r}, row {row}: {lengths[row]} ids, expected one; name the key among the lists")
    return pa.array(values, kind)


def _ids(table: pa.Table, key: str) -> np.ndarray | Jagged:
    column = _whole(table, key)
    if pt.is_list(column.type) or pt.is_large_list(column.type):
        if pt.is_integer(column.type.value_type) and not column.values.null_count:
            offsets = column.offsets.to_numpy().astype(np.int64)
            return Jagged(column.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0])
    elif pt.is_integer(column.type):
        return np.asarray(column.to_numpy())
    raise SchemaError(f"column {key!r}: expected integers or lists of them without nulls, got {column.type}")


def _numbers(table: pa.Table, names: tuple[str, ...]) -> Tensor:
    """float32 ``[N, len(names)]``."""
    columns = [_whole(table, name) for name in names]
    for name, column in zip(names, columns, strict=True):
        if not (pt.is_floating(column.type) or pt.is_integer(column.type)):
            raise SchemaError(f"column {name!r}: expected numbers without nulls, got {column.type}")
    return matrix([column.to_numpy() for column in columns], table.num_rows, np.float32)


def _whole(table: pa.Table, name: str) -> pa.Array:
    """A column in one piece."""
    if name not in table.schema.names:
        raise SchemaError(f"missing column: {unknown('column', name, table.schema.names)}")
    column = table.column(name)
    if column.null_count:
        raise SchemaError(f"column {name!r}: expected no nulls in encoded rows, got {column.null_count}")
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _take(column: Jagged, rows: np.ndarray) -> Jagged:
    starts = column.offsets[rows]
    return gather(column.values, starts, column.offsets[rows + 1] - starts)


def _concat(columns: Sequence[Jagged]) -> Jagged:
    ends = np.cumsum([0, *(len(column.values) for column in columns)])
    offsets = [column.offsets[1:] + end for column, end in zip(columns, ends, strict=False)]
    return Jagged(np.concatenate([column.values for column in columns]), np.concatenate([[0], *offsets]))


def _cat(name: str, parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    if there and len(there) < len(parts):
        raise DataError(f"{name}: expected in all rows or in none, but {len(there)} of {len(parts)} parts have them")
    return torch.cat(there) if there else None
