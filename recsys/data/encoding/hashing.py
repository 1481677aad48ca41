# SPDX-License-Identifier: Apache-2.0
"""Rows of tables from stable hashes of ids, and what it costs to share rows between ids that a table has no room for. Holds no torch."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core.errors import ConfigError
from recsys.core.hashing import Values, hash64
from recsys.data.encoding.coders import FIRST, NO_VALUE

_MAX = np.int64(2**63 - 2)  # 2⁶³ − 1 marks an empty slot in TorchRec's maps


def raw_ids(values: Values, seed: int = 0) -> np.ndarray:
    """What a table with managed ids reads: int64 ``[N]`` from 1 to 2⁶³ − 2, and 0 for null. Uses 63 bits of `hash64`."""
    ids = np.clip((hash64(values, seed) >> np.uint64(1)).astype(np.int64), 1, _MAX)
    return np.where(_present(values), ids, NO_VALUE)


def hashed_rows(values: Values, rows: int, seed: int = 0) -> np.ndarray:
    """Rows of a table without a vocabulary: int64 ``[N]`` from 2 to ``rows − 1``, and 0 for null. Ids of one row share its vector.

    Raises:
        ConfigError: fewer than 3 rows.
    """
    if rows <= FIRST:
        raise ConfigError(f"rows: expected at least {FIRST + 1} for hashed ids, got {rows}")
    return np.where(_present(values), spread(hash64(values, seed), rows), NO_VALUE)


def spread(hashes: np.ndarray, rows: int) -> np.ndarray:
    """Rows of a table for hashes of at least 0: int64 ``[N]`` from 2 to ``rows − 1``."""
    return np.asarray((hashes % hashes.dtype.type(rows - FIRST)).astype(np.int64) + FIRST)


class HashCoder:
    """Rows of a table without a vocabulary; see `hashed_rows`.

    Args:
        rows: of the table.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def encode(self, values: pa.Array) -> np.ndarray:
        """int64 ``[N]``: the row of each of the N strings (large_string)."""
        return hashed_rows(values, self.rows)


class RawCoder:
    """No rows, but the ids from which a table with managed ids makes its rows; see `raw_ids`.

    Args:
        rows: of the table.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def encode(self, values: pa.Array) -> np.ndarray:
        """int64 ``[N]``: the id of each of the N strings (large_string)."""
        return raw_ids(values)


def sharing(ids: int, rows: int) -> float:
    """The expected share of ``ids`` distinct ids that share their row with another: ``1 − (1 − 1/m)^(ids − 1)``, m = rows − 2.

    At as many ids as rows it is 63%; for 1% a table needs 100 rows for each id. A vocabulary costs one row for each id and shares none.
    """
    return -math.expm1((ids - 1) * math.log1p(-1 / (rows - FIRST))) if ids > 1 and rows > FIRST + 1 else float(ids > 1)


def _present(values: Values) -> np.ndarray:
    whole = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return np.asarray(pc.is_valid(whole).to_numpy(zero_copy_only=False), dtype=bool)
