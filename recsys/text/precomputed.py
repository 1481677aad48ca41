# SPDX-License-Identifier: Apache-2.0
"""Item vectors that somebody else made: read from a file, by item id."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import DataError, SchemaError, unknown
from recsys.core.files import sha256_file
from recsys.text.base import ItemVectors, Vectors


@register("text_encoder", "precomputed")
class Precomputed(ItemVectors):
    """A Parquet file with a column of item ids and one of vectors (lists of numbers, all of one length).

    Raises:
        DataError: the file is not there.
    """

    class Config(BaseConfig):
        """Where they stand.

        Attributes:
            path: the Parquet file.
            item: the column of item ids, strings.
            vector: the column of vectors.
        """

        name: Literal["precomputed"] = "precomputed"
        path: Path
        item: str = "item_id"
        vector: str = "vector"

    def __init__(self, config: Config) -> None:
        if not config.path.is_file():
            raise DataError(f"text_encoder 'precomputed': there is no file {config.path}")
        self.config = config

    @property
    def identity(self) -> str:
        """The file's content."""
        return f"precomputed {sha256_file(self.config.path)} {self.config.item} {self.config.vector}"

    def vectors_of(self, ids: Sequence[str]) -> Vectors:
        """float32 ``[N, D]``: the vector of each item.

        Raises:
            SchemaError: a column is absent or of another type, or the vectors have several lengths.
            DataError: an item has no vector or two of them, or one that is not finite.
        """
        table = self._read()
        known = table[self.config.item].to_pylist()
        rows = {item: row for row, item in enumerate(known)}
        if len(rows) < len(known):
            twice = next(item for row, item in enumerate(known) if rows[item] != row)
            raise DataError(f"{self.config.path}: item {twice!r} has two vectors")
        if missing := [item for item in ids if item not in rows]:
            raise DataError(f"{self.config.path}: {len(missing)} of {len(ids)} items have no vector, such as {missing[0]!r}")
        matrix = self._matrix(table[self.config.vector].combine_chunks())[[rows[item] for item in ids]]
        finite = np.isfinite(matrix).all(1)
        if not finite.all():
            raise DataError(f"{self.config.path}: the vector of item {ids[int(np.argmin(finite))]!r} is not finite")
        return matrix

    def _read(self) -> pa.Table:
        config = self.config
        names = pq.read_schema(config.path).names
        for column in (config.item, config.vector):
            if column not in names:
                raise SchemaError(f"{config.path}: {unknown('column', column, names)}")
        table = pq.read_table(config.path, columns=[config.item, config.vector])
        kind = table.schema.field(config.vector).type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not lists or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
            raise SchemaError(f"{config.path}: column {config.vector!r}: expected lists of numbers, got {kind}")
        return table.set_column(0, config.item, table[config.item].cast(pa.string()))

    def _matrix(self, column: pa.Array) -> Vectors:
        lengths = set(np.unique(pc.list_value_length(column).fill_null(0).to_numpy()).tolist())
        if len(lengths) > 1 or column.null_count:
            raise SchemaError(f"{self.config.path}: column {self.config.vector!r}: expected vectors of one length, got {sorted(lengths)}")
        values: Vectors = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)
        return values
