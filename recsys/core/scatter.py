# SPDX-License-Identifier: Apache-2.0
"""Tables that do not fit in memory, scattered over parts by a hash of their key, so that each part fits.

A source is read in *chunks* of whole row groups. Each chunk becomes one scattered file: for every piece of the chunk it has as many row
groups as there are parts, row group p of a piece holding the piece's rows of part p (some are empty), in the order of the source. What a
part holds is then read from row group p of every piece of every file, in the order of the source. A scattered file appears under its name
only once it is whole, so that a run that was killed goes on with the chunks that are absent.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from recsys.core.config import Config
from recsys.core.delta import pinned
from recsys.core.errors import DataError, SchemaError, unknown
from recsys.core.files import new_file
from recsys.core.hashing import Values, hash64

CHUNK_ROWS = 1 << 20
MAX_PARTS = 1 << 12
HASH = "hash64 of the key as a string, seed 1"
"""How a key's part is chosen: written beside parts, so that parts of another choice are not taken for these."""
_SEED, _HASHED_ROWS = 1, 1 << 17


class Chunk(Config):
    """Consecutive row groups of one Parquet file, read and scattered at once.

    Attributes:
        path: the file.
        groups: the row groups.
        first: the place of their first row in the source, counted from 0.
        rows: how many rows they have.
    """

    path: str
    groups: tuple[int, ...]
    first: int
    rows: int


def parquet_files(source: Path) -> list[str]:
    """The Parquet files of a source (one file, a folder, or a version of a Delta table), in the order in which they make one table.

    Raises:
        ConfigError: it is a Delta table, and the library is not installed.
        DataError: there is none, or it cannot be read.
    """
    if (version := pinned(source)) is not None:
        return version.files()
    if not source.exists():
        raise DataError(f"{source}: no such file")
    try:
        files: list[str] = ds.dataset(source, format="parquet").files
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{source}: cannot be read: {error}") from None
    if not files:
        raise DataError(f"{source}: expected Parquet files, found none")
    return files


def chunks(source: Path, rows: int = CHUNK_ROWS) -> list[Chunk]:
    """A source in chunks of at most ``rows`` rows (but of one row group at least); one at least for each file.

    Raises:
        DataError: there is no file, or one cannot be read.
    """
    found, place = [], 0
    for file in parquet_files(source):
        sizes = _row_groups(file)
        first = 0
        while first < len(sizes) or first == 0:
            last, taken = first, 0
            while last < len(sizes) and (last == first or taken + sizes[last] <= rows):
                taken += sizes[last]
                last += 1
            found.append(Chunk(path=file, groups=tuple(range(first, last)), first=place, rows=taken))
            place += taken
            first = max(last, 1)
    return found


def schema_of(source: Path) -> pa.Schema:
    """The columns of a source: those of its first file."""
    return pq.read_schema(parquet_files(source)[0])


def read_chunk(chunk: Chunk, schema: pa.Schema, *, rows: int = CHUNK_ROWS) -> Iterator[tuple[int, pa.Table]]:
    """The pieces of a chunk, each with the place of its first row in the source; one empty piece where there are no rows.

    Args:
        chunk: what to read.
        schema: the columns, as which they are cast: files of one source may differ a little.
        rows: how many a piece has at most.

    Raises:
        DataError: the file cannot be read.
        SchemaError: it lacks a column, or one cannot be cast without loss.
    """
    place = chunk.first
    try:
        with pq.ParquetFile(chunk.path) as file:
            for name in schema.names:
                if name not in file.schema_arrow.names:
                    raise SchemaError(f"{chunk.path}: missing column: {unknown('column', name, file.schema_arrow.names)}")
            batches = file.iter_batches(batch_size=min(rows, 1 << 16), row_groups=list(chunk.groups), columns=schema.names)
            tables = (_as(pa.Table.from_batches([batch]), schema, chunk.path) for batch in batches)
            for table in regroup(tables, schema, rows):
                yield place, table
                place += table.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{chunk.path}: cannot be read: {error}") from None


def regroup(tables: Iterable[pa.Table], schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of ``rows`` rows, the last of which may be shorter; one empty table where there are none."""
    waiting: list[pa.Table] = []
    count, any_yet = 0, False
    for table in tables:
        while count + table.num_rows >= rows:
            head = table.slice(0, rows - count)
            table = table.slice(head.num_rows)
            yield pa.concat_tables([*waiting, head]).combine_chunks()
            waiting, count, any_yet = [], 0, True
        if table.num_rows:
            waiting.append(table)
            count += table.num_rows
    if waiting or not any_yet:
        yield pa.concat_tables(waiting).combine_chunks() if waiting else schema.empty_table()


def part_of(keys: Values, parts: int) -> np.ndarray:
    """uint16 ``[N]``: the part of each key, the same wherever and whenever it is asked; a null has that of the empty string.

    Args:
        keys: ids, of any type that can be cast to a string.
        parts: how many there are, at most `MAX_PARTS`.
    """
    found = np.empty(len(keys), np.uint16)
    for first in range(0, len(keys), _HASHED_ROWS):
        piece = keys.slice(first, _HASHED_ROWS).cast(pa.string())
        found[first : first + _HASHED_ROWS] = hash64(piece, _SEED) % np.uint64(parts)
    return found


class Scattered:
    """Writes one scattered file, piece by piece, as a context; without an error at its end the file takes its name.

    Args:
        path: the file.
        schema: of the pieces.
        parts: how many there are.
    """

    def __init__(self, path: Path, schema: pa.Schema, parts: int) -> None:
        self._parts = parts
        self._stack = ExitStack()
        temporary = self._stack.enter_context(new_file(path))
        # Read once and by row group: dictionaries and statistics of small row groups cost more than they save.
        writer = pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=False, write_statistics=False)
        self._writer = self._stack.enter_context(writer)

    def write(self, table: pa.Table, part: np.ndarray) -> None:
        """Add a piece.

        Args:
            table: N rows.
            part: uint16 ``[N]``, the part of each.
        """
        ordered = table.take(pa.array(np.argsort(part, kind="stable")))
        counts = np.bincount(part, minlength=self._parts)
        for first, count in zip(np.cumsum(counts) - counts, counts, strict=True):
            self._writer.write_table(ordered.slice(first, count), row_group_size=max(int(count), 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)


def scattered_files(folder: Path) -> list[Path]:
    """The scattered files of a folder, in the order of their names."""
    return sorted(folder.glob("*.parquet"))


def gather(files: Sequence[Path], part: int, parts: int) -> Iterator[pa.Table]:
    """The rows of a part, in the order of the source: one table, maybe empty, for each scattered file."""
    for path in files:
        with pq.ParquetFile(path) as file:
            yield file.read_row_groups(list(range(part, file.num_row_groups, parts)))


def gather_table(files: Sequence[Path], part: int, parts: int) -> pa.Table:
    """All rows of a part, in the order of the source."""
    return pa.concat_tables(list(gather(files, part, parts)))


def _as(table: pa.Table, schema: pa.Schema, path: str) -> pa.Table:
    columns = []
    for field in schema:
        values = table.column(field.name)
        try:
            columns.append(values if values.type == field.type else values.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise SchemaError(
                f"{path}: column {field.name!r}: expected {field.type} as in the first file, got {values.type}: {error}"
            ) from None
    return pa.table(columns, schema=schema)


def _row_groups(file: str) -> list[int]:
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
