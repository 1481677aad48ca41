# SPDX-License-Identifier: Apache-2.0
"""A log of Parquet parts that is written off the path of whoever adds to it, and parts from which rows are taken away later."""

import io
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.core.errors import DataError
from recsys.core.files import new_file, write_bytes

log = logging.getLogger(__name__)

T = TypeVar("T")

SUFFIX = ".parquet"


class PartLog(Generic[T]):
    """Takes entries at once, and writes them to a folder from a thread of its own, one file for each flush.

    A file takes its name once it is whole, so that a process that dies leaves whole parts only. Entries that find no room are dropped and
    counted, as are those whose file could not be written.

    Args:
        folder: where the parts go; it is made.
        table_of: the rows of some entries; called on the log's thread.
        name: of the log, for its thread and for messages.
        capacity: how many rows may wait to be written.
        flush_rows: how many waiting rows make a file.
        flush_seconds: how long a row waits at most until its file is written.

    Attributes:
        written: rows in files.
        dropped: rows that are in no file.
    """

    def __init__(
        self, folder: Path, table_of: Callable[[list[T]], pa.Table], *, name: str, capacity: int, flush_rows: int, flush_seconds: float
    ) -> None:
        self._folder, self._table_of, self._name = folder, table_of, name
        self._capacity, self._flush_rows, self._flush_seconds = capacity, min(flush_rows, capacity), flush_seconds
        self._waiting: list[T] = []
        self._rows = 0
        self._closed = False
        self._wake = threading.Condition()
        self._parts = 0
        self.written = self.dropped = 0
        self._thread = threading.Thread(target=self._write_until_closed, name=name.replace(" ", "-"), daemon=True)
        self._thread.start()

    def offer(self, entry: T, rows: int = 1) -> bool:
        """Take an entry of so many rows, or drop it where there is no room or the log is closed; returns at once which it was."""
        with self._wake:
            if self._closed or self._rows + rows > self._capacity:
                self.dropped += rows
                return False
            self._waiting.append(entry)
            self._rows += rows
            if self._rows >= self._flush_rows:
                self._wake.notify()
            return True

    def close(self) -> None:
        """Write what waits, and take no more."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _write_until_closed(self) -> None:
        closed = False
        while not closed:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._rows >= self._flush_rows, self._flush_seconds)
                taken, count, closed = self._waiting, self._rows, self._closed
                self._waiting, self._rows = [], 0
            if taken:
                self._write(taken, count)

    def _write(self, taken: list[T], count: int) -> None:
        try:
            content = io.BytesIO()
            pq.write_table(self._table_of(taken), content)
            self._parts += 1
            write_bytes(self._folder / f"part-{time.time_ns():020d}-{os.getpid()}-{self._parts:06d}{SUFFIX}", content.getvalue())
        except Exception:
            log.exception("%s: %d rows could not be written to %s and are dropped", self._name, count, self._folder)
            with self._wake:
                self.dropped += count
        else:
            self.written += count


def part_files(folder: Path) -> list[Path]:
    """The parts of a log, in the order in which they were written."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))


def read_part(path: Path, key: bytes, version: bytes, what: str, columns: list[str] | None = None) -> pa.Table:
    """The rows of a part.

    Args:
        path: the file.
        key: in the file's metadata, of the version of its format.
        version: the one that is known.
        what: to call the file in errors, such as ``served part``.
        columns: which to read; all by default.

    Raises:
        DataError: it is damaged, of another version or something else; names the file.
    """
    try:
        with pq.ParquetFile(path) as file:
            found = (file.schema_arrow.metadata or {}).get(key)
            part = file.read(columns) if found == version else None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{what} {path}: not a whole Parquet file: {error}") from None
    if part is None:
        raise DataError(f"{what} {path}: expected the metadata {key.decode()} = {version.decode()}, got {found}")
    return part


def drop_rows(path: Path, gone: Callable[[pa.Table], np.ndarray]) -> int:
    """Take rows out of a Parquet file, which is replaced by one without them; one that holds none of them is left alone.

    Args:
        path: the file.
        gone: bool ``[N]`` of its N rows: which ones go.

    Returns:
        How many went.

    Raises:
        DataError: the file is damaged; names it.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file: {error}") from None
    mask = gone(table)
    if mask.any():
        with new_file(path) as temporary:
            pq.write_table(table.filter(pa.array(~mask)), temporary)
    return int(mask.sum())


def remove_leftovers(folder: Path, *, older_than: float = 60.0) -> int:
    """Remove the half-written files that writers left who died; how many. One that is younger (seconds) may have a writer still."""
    found = [path for path in folder.rglob(".*.tmp") if path.is_file() and time.time() - path.stat().st_mtime > older_than]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)
