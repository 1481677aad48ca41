# SPDX-License-Identifier: Apache-2.0
"""From tables to batches: shuffled by seed and epoch, in bounded memory, resumable at any batch.

The order of an epoch is a function of (seed, epoch) alone. The cursor is the number of samples of the epoch that were handed out, so it
does not depend on the batch size, nor on how many processes share the batches: each takes a range of the rows of every one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.core.errors import DataError, SchemaError, unknown
from recsys.data.cursor import Resumable
from recsys.data.prefetch import prefetch
from recsys.data.world import World

Batch = TypeVar("Batch")
BatchOut = TypeVar("BatchOut", covariant=True)
_ALONE = World()


class Loader(Protocol[BatchOut]):
    """What a trainer asks of a source of batches."""

    def __iter__(self) -> Iterator[BatchOut]:
        """The batches of the current epoch, from its beginning, or right after `load_state_dict` from the loaded cursor."""
        ...

    def __len__(self) -> int:
        """The number of batches of a whole epoch."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the order. The cursor goes back to 0 unless this is the current epoch already."""
        ...

    def state_dict(self) -> dict[str, int]:
        """``{"epoch", "samples"}``: the samples of the epoch handed out so far (not those prepared ahead)."""
        ...

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a saved cursor: the next iteration yields exactly the batches that were left."""
        ...


class Rows(Protocol[BatchOut]):
    """Encoded rows, such as `recsys.data.encoded.EncodedRows`."""

    def __len__(self) -> int:
        """How many they are."""
        ...

    def take(self, rows: np.ndarray) -> Self:
        """A copy of some rows, by their places (int64)."""
        ...

    def concat(self, others: Sequence[Self]) -> Self:
        """These rows and then others."""
        ...

    def batch(self) -> BatchOut:
        """All of them as a batch."""
        ...


@runtime_checkable
class RowEncoder(Protocol[BatchOut]):
    """Encodes many rows at once, such as an `Encoder`; batches are then gathered from what it made."""

    def rows(self, table: pa.Table) -> Rows[BatchOut]:
        """Encode the rows of a table, whose strings may be dictionary-encoded."""
        ...


class _BatchLoader(Resumable, ABC, Generic[Batch]):
    """The transform and the prefetching that loaders of tables share. Subclasses give the rows of an epoch in order."""

    def __init__(
        self,
        transform: Callable[[pa.Table], Batch],
        rows: int,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        prefetch: int,
        world: World,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if prefetch < 0:
            raise ValueError(f"prefetch: expected at least 0, got {prefetch}")
        super().__init__(rows)
        self.rows = rows
        self.batch_size = batch_size
        self._transform = transform
        self.world = world
        self._seed, self._shuffle, self._drop_last, self._prefetch = seed, shuffle, drop_last, prefetch

    def __len__(self) -> int:
        """The number of batches of a whole epoch."""
        return self.rows // self.batch_size if self._drop_last else -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the current epoch, from its beginning, or right after `load_state_dict` from the loaded cursor."""
        made = self._made(self._epoch, self._begin())
        # The cursor moves here, where a batch is handed out, and not in the thread that prepares it.
        with closing(prefetch(made, self._prefetch) if self._prefetch else made) as batches:
            for rows, batch in batches:
                self._samples += rows
                yield batch

    def _made(self, epoch: int, start: int) -> Generator[tuple[int, Batch], None, None]:
        for table in self._tables(epoch, start):
            if table.num_rows == self.batch_size or not self._drop_last:
                yield table.num_rows, self._share(table)

    def _share(self, table: pa.Table) -> Batch:
        """What this process takes of a batch. Rows that it lacks are the batch's first one, muted."""
        own, lacking = self.world.share(table.num_rows)
        if not lacking:
            return self._transform(table if len(own) == table.num_rows else table.slice(own.start, len(own)))
        batch: Any = self._transform(table.take(pa.array([*own, *[0] * lacking])))
        muted: Batch = batch.muted(lacking)
        return muted

    def _order(self, rows: int, *key: int) -> np.ndarray:
        """A permutation of ``rows`` that depends on the seed and ``key``; the identity where nothing is shuffled."""
        return np.random.default_rng([self._seed, *key]).permutation(rows) if self._shuffle else np.arange(rows)

    @abstractmethod
    def _tables(self, epoch: int, start: int) -> Iterator[pa.Table]:
        """The rows of the epoch in order, without the first ``start``, in tables of ``batch_size`` rows (the last one may be shorter)."""


class TableLoader(_BatchLoader[Batch]):
    """Batches of a table in memory.

    Args:
        table: the rows.
        transform: from a table of at most ``batch_size`` rows to a batch, such as `Encoder.transform`.
        batch_size: rows per batch, of all processes together.
        seed: with the epoch, decides the order: a permutation of all rows.
        shuffle: False keeps the order of the table.
        drop_last: leave out a last batch of fewer rows.
        prefetch: how many batches a background thread prepares ahead; 0 for none.
        world: the processes that share every batch.
    """

    def __init__(
        self,
        table: pa.Table,
        transform: Callable[[pa.Table], Batch],
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        prefetch: int = 0,
        world: World = _ALONE,
    ) -> None:
        super().__init__(
            transform,
            table.num_rows,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            prefetch=prefetch,
            world=world,
        )
        self._table = table.combine_chunks()

    def _tables(self, epoch: int, start: int) -> Iterator[pa.Table]:
        order = self._order(self.rows, epoch)
        for first in range(start, self.rows, self.batch_size):
            yield self._table.take(pa.array(order[first : first + self.batch_size]))


@dataclass(frozen=True)
class _File:
    path: Path
    metadata: pq.FileMetaData


@dataclass(frozen=True)
class _RowGroup:
    file: _File
    index: int
    rows: int


class ParquetLoader(_BatchLoader[Batch]):
    """Batches of Parquet files that need not fit in memory.

    An epoch permutes the row groups of all files and takes them ``buffer_groups`` at a time; the rows of such a window are permuted
    together. So at most ``buffer_groups`` row groups are decoded at once (beside less than one batch of rows left over from the window
    before, and the batches prepared ahead), and rows mix across as many. Write row groups of a few batches each. The footers of all files
    are kept: about a kilobyte for each column of each row group.

    Given an `Encoder` in the place of a transform, a row group is encoded as soon as it is read, and only what was encoded is kept,
    permuted and gathered: integers in the place of strings, each distinct string of a row group looked up once. The batches are the same.

    Args:
        paths: Parquet files of one schema, or one folder, whose ``*.parquet`` files are read in the order of their names; where it has
            none, those of its folders, such as ``part=0001``.
        transform: an `Encoder` or another `RowEncoder`; or a function from a table of at most ``batch_size`` rows to a batch.
        batch_size: rows per batch, of all processes together.
        seed: with the epoch, decides the order.
        shuffle: False keeps the order of the files.
        columns: read these columns only.
        drop_last: leave out a last batch of fewer rows.
        buffer_groups: how many row groups make a window.
        prefetch: how many batches a background thread prepares ahead; 0 for none.
        world: the processes that share every batch. Each decodes all row groups, and transforms its own rows.

    Raises:
        DataError: there is no file.
        SchemaError: a file lacks one of ``columns``, or has other types than the first file.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        transform: Callable[[pa.Table], Batch] | RowEncoder[Batch],
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        columns: Sequence[str] | None = None,
        drop_last: bool = False,
        buffer_groups: int = 4,
        prefetch: int = 0,
        world: World = _ALONE,
    ) -> None:
        if buffer_groups < 1:
            raise ValueError(f"buffer_groups: expected at least 1, got {buffer_groups}")
        files = [_File(path, pq.read_metadata(path)) for path in _expand(paths)]
        self._columns = list(columns) if columns is not None else None
        _check_schemas(files, self._columns)
        self._groups = [
            _RowGroup(file, g, file.metadata.row_group(g).num_rows) for file in files for g in range(file.metadata.num_row_groups)
        ]
        self._buffer_groups = buffer_groups
        rows = sum(group.rows for group in self._groups)
        self._encoder: RowEncoder[Batch] | None = transform if isinstance(transform, RowEncoder) else None
        whole = (lambda table: transform.rows(table).batch()) if isinstance(transform, RowEncoder) else transform
        super().__init__(
            whole, rows, batch_size=batch_size, seed=seed, shuffle=shuffle, drop_last=drop_last, prefetch=prefetch, world=world
        )

    def _made(self, epoch: int, start: int) -> Generator[tuple[int, Batch], None, None]:
        return super()._made(epoch, start) if self._encoder is None else self._encoded(self._encoder, epoch, start)

    def _encoded(self, encoder: RowEncoder[Batch], epoch: int, start: int) -> Generator[tuple[int, Batch], None, None]:
        rest: Rows[Batch] | None = None
        for groups, order in self._windows(epoch, start):
            parts = [] if rest is None else [rest]
            if rest is not None:
                order = np.concatenate([np.arange(len(rest)), order + len(rest)])
            parts += [encoder.rows(self._read_group(group, dictionaries=True)) for group in groups if group.rows]
            window = parts[0].concat(parts[1:])
            del parts
            whole = len(order) - len(order) % self.batch_size
            for first in range(0, whole, self.batch_size):
                yield self.batch_size, self._gathered(window, order[first : first + self.batch_size])
            rest = window.take(order[whole:]) if whole < len(order) else None
            del window  # before the next one is decoded
        if rest is not None and not self._drop_last:
            yield len(rest), self._gathered(rest, np.arange(len(rest)))

    def _gathered(self, rows: Rows[Batch], places: np.ndarray) -> Batch:
        """What this process takes of a batch, see `_share`."""
        own, lacking = self.world.share(len(places))
        chosen = places[own.start : own.stop]
        if not lacking:
            return rows.take(chosen).batch()
        batch: Any = rows.take(np.concatenate([chosen, np.repeat(places[:1], lacking)])).batch()
        muted: Batch = batch.muted(lacking)
        return muted

    def _tables(self, epoch: int, start: int) -> Iterator[pa.Table]:
        rest: list[pa.Table] = []
        missing = self.batch_size
        for groups, order in self._windows(epoch, start):
            window = self._read(groups)
            first = 0
            while first < len(order):
                piece = window.take(pa.array(order[first : first + missing]))  # a copy, which does not keep the window alive
                first += missing
                rest.append(piece)
                missing -= piece.num_rows
                if missing == 0:
                    yield pa.concat_tables(rest)
                    rest, missing = [], self.batch_size
            del window  # before the next one is decoded
        if rest:
            yield pa.concat_tables(rest)

    def _windows(self, epoch: int, start: int) -> Iterator[tuple[list[_RowGroup], np.ndarray]]:
        """The row groups of every window and the order of its rows, without the first ``start`` rows of the epoch."""
        groups = [self._groups[i] for i in self._order(len(self._groups), epoch, 0)]
        done = 0
        for number, first in enumerate(range(0, len(groups), self._buffer_groups), start=1):
            window = groups[first : first + self._buffer_groups]
            rows = sum(group.rows for group in window)
            if done + rows > start:
                yield window, self._order(rows, epoch, number)[max(0, start - done) :]
            done += rows

    def _read(self, groups: Iterable[_RowGroup]) -> pa.Table:
        return pa.concat_tables([self._read_group(group) for group in groups])

    def _read_group(self, group: _RowGroup, *, dictionaries: bool = False) -> pa.Table:
        """The rows of a group; ``dictionaries``: with strings as dictionaries."""
        wanted = _strings(group.file.metadata) if dictionaries else None
        with pq.ParquetFile(group.file.path, metadata=group.file.metadata, read_dictionary=wanted) as file:
            return file.read_row_group(group.index, columns=self._columns)


def _strings(metadata: pq.FileMetaData) -> list[str]:
    """The paths of the columns of strings, and of lists of strings."""
    columns = (metadata.schema.column(i) for i in range(metadata.num_columns))
    return [column.path for column in columns if column.logical_type.type == "STRING"]


def _expand(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    files = [file for path in given for file in (_inside(path) if path.is_dir() else [path])]
    if not files:
        raise DataError(f"no Parquet file in {[str(path) for path in given]}")
    return files


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("*/*.parquet"))


def _check_schemas(files: list[_File], columns: list[str] | None) -> None:
    schemas = [file.metadata.schema.to_arrow_schema() for file in files]
    expected = {name: schemas[0].field(name).type for name in schemas[0].names}
    for file, schema in zip(files, schemas, strict=True):
        for name in columns if columns is not None else expected:
            if name not in schema.names:
                raise SchemaError(f"{file.path}: missing column: {unknown('column', name, schema.names)}")
            if schema.field(name).type != expected[name]:
                raise SchemaError(
                    f"{file.path}: column {name!r}: expected {expected[name]} as in {files[0].path}, got {schema.field(name).type}"
                )
