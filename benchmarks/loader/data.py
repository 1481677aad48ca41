# SPDX-License-Identifier: Apache-2.0
"""The synthetic rows that all contestants read, as Parquet: raw strings, and the same rows as integers.

Criteo's shape and a list beside it: 13 dense columns (float32, some null), 26 columns of strings and one of lists of strings (each a Zipf
law over 100,000 values of eight characters), and a label. Only numpy and pyarrow are needed, since contestants have environments of their
own.

A folder of rows holds a folder for each of `KINDS`, with files of `FILE_ROWS` rows in row groups of `GROUP_ROWS`. ``encoded`` is what a
vocabulary makes of ``raw``: ids of 2 and more, 0 for no value, and zeros for dense values that are null. ``padded`` is the same with
lists filled up to `LIST` with zeros, which is how peers keep them, and ``flat`` has the places of those lists as columns. All but ``raw``
are written as our library writes encoded rows, which pyarrow reads twice as fast as what it writes by default.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DENSE = tuple(f"d{i}" for i in range(13))
CATEGORICAL = tuple(f"c{i}" for i in range(26))
TAGS, LABEL = "tags", "label"
VALUES, ZIPF = 100_000, 1.05
LIST = 4
NULLS = 0.05
BATCH = 4096
GROUP_ROWS = 32_768
FILE_ROWS = 4 * GROUP_ROWS
FIRST = 2
"""The least id of a value."""
PLACES = tuple(f"{TAGS}{i}" for i in range(LIST))
KINDS = ("raw", "encoded", "padded", "flat")
ENCODED = {"compression": "lz4", "use_dictionary": False, "use_byte_stream_split": True}
"""How encoded rows are written."""


class Source:
    """Rows by their number; equal for equal seeds.

    Args:
        values: how many each column of strings has.
    """

    def __init__(self, values: int = VALUES, *, seed: int = 0) -> None:
        weights = 1.0 / np.arange(1, values + 1) ** ZIPF
        self._cumulative = np.cumsum(weights / weights.sum())
        self._seed, self.values = seed, values
        # Spread over the numbers of eight hexadecimal digits by an odd factor, so that all values differ.
        self._words = pa.array([f"{i * 2654435761 % 2**32:08x}" for i in range(values)], pa.string())

    def blocks(self, rows: int) -> Iterator[tuple[pa.Table, ...]]:
        """The rows in each of `KINDS`, `FILE_ROWS` at a time."""
        for start in range(0, rows, FILE_ROWS):
            yield self._block(start, min(FILE_ROWS, rows - start))

    def _block(self, start: int, rows: int) -> tuple[pa.Table, ...]:
        random = np.random.default_rng([self._seed, start])
        raw: dict[str, pa.Array] = {}
        encoded: dict[str, pa.Array] = {}
        for name in DENSE:
            values, absent = random.normal(size=rows).astype(np.float32), random.random(rows) < NULLS
            raw[name] = pa.array(values, mask=absent)
            encoded[name] = pa.array(np.where(absent, np.float32(0), values))
        for name in CATEGORICAL:
            drawn, absent = self._draw(random, rows), random.random(rows) < NULLS
            raw[name] = self._strings(drawn, absent)
            encoded[name] = pa.array(np.where(absent, 0, drawn + FIRST).astype(np.int32))
        lengths = random.integers(1, LIST + 1, rows)
        drawn = self._draw(random, int(lengths.sum()))
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        raw[TAGS] = pa.ListArray.from_arrays(offsets, self._strings(drawn, np.zeros(len(drawn), bool)))
        encoded[TAGS] = pa.ListArray.from_arrays(offsets, pa.array((drawn + FIRST).astype(np.int32)))
        raw[LABEL] = encoded[LABEL] = pa.array((random.random(rows) < 0.25).astype(np.float32))
        return pa.table(raw), *(_required(columns) for columns in (encoded, *_padded(encoded, drawn + FIRST, lengths)))

    def _draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        return np.minimum(np.searchsorted(self._cumulative, random.random(count)), self.values - 1)

    def _strings(self, drawn: np.ndarray, absent: np.ndarray) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(drawn.astype(np.int32), mask=absent), self._words).cast(pa.string())


def write(folder: Path, rows: int, source: Source) -> None:
    """Write all kinds of rows below ``folder``."""
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
    for number, tables in enumerate(source.blocks(rows)):
        for kind, table in zip(KINDS, tables, strict=True):
            path, settings = folder / kind / f"part_{number:05d}.parquet", {} if kind == "raw" else ENCODED
            pq.write_table(table, path, row_group_size=GROUP_ROWS, **settings)


def files(folder: Path) -> list[str]:
    """The files of one kind of rows, in order."""
    return [str(path) for path in sorted(folder.glob("*.parquet"))]


def _padded(encoded: dict[str, pa.Array], ids: np.ndarray, lengths: np.ndarray) -> tuple[dict[str, pa.Array], dict[str, pa.Array]]:
    """The columns with lists of one length, and with a column for each of their places."""
    matrix = np.zeros((len(lengths), LIST), dtype=np.int32)
    matrix[np.arange(LIST) < lengths[:, None]] = ids
    lists = pa.ListArray.from_arrays(pa.array(np.arange(0, matrix.size + 1, LIST, dtype=np.int32)), pa.array(matrix.ravel()))
    flat = {name: column for name, column in encoded.items() if name != TAGS}
    return encoded | {TAGS: lists}, flat | {name: pa.array(matrix[:, i]) for i, name in enumerate(PLACES)}


def _required(columns: dict[str, pa.Array]) -> pa.Table:
    """A table whose schema says that nothing is null."""
    kinds = {TAGS: pa.list_(pa.field("element", pa.int32(), False))}
    table = pa.table(columns)
    return table.cast(pa.schema([pa.field(field.name, kinds.get(field.name, field.type), False) for field in table.schema]))
