# SPDX-License-Identifier: Apache-2.0
"""Stable 64-bit hashes of ids, and what it costs to share rows between ids that a table has no room for. Holds no torch."""

import math
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core.errors import ConfigError, SchemaError
from recsys.data.encoding.coders import FIRST, NO_VALUE

_MAX = np.int64(2**63 - 2)  # 2⁶³ − 1 marks an empty slot in TorchRec's maps
_GOLDEN, _MUL1, _MUL2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

Values: TypeAlias = pa.Array | pa.ChunkedArray


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's step (Steele et al., OOPSLA 2014): a bijection of uint64 whose every output bit depends on every input bit."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MUL1
    x = (x ^ (x >> np.uint64(27))) * _MUL2
    return np.asarray(x ^ (x >> np.uint64(31)), dtype=np.uint64)


def _hash_bytes(array: pa.Array) -> np.ndarray:
    """Tabulation hashing: the sum of a pseudo-random number for each (position, byte), so that all bytes are hashed at once."""
    buffers = array.buffers()
    offsets = np.frombuffer(buffers[1], dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    if buffers[2] is None or offsets[0] == offsets[-1]:
        return np.zeros(len(array), dtype=np.uint64)
    data = np.frombuffer(buffers[2], dtype=np.uint8)[offsets[0] : offsets[-1]]
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    position = np.arange(len(data), dtype=np.int64) - np.repeat(starts, lengths)
    terms = _mix(position.astype(np.uint64) << np.uint64(8) | data.astype(np.uint64))
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(terms, dtype=np.uint64)])  # modulo 2⁶⁴
    return np.asarray(sums[offsets[1:] - offsets[0]] - sums[starts] + lengths.astype(np.uint64) * _MUL2, dtype=np.uint64)


def hash64(values: Values, seed: int = 0) -> np.ndarray:
    """A hash of every value, uint64 ``[N]``, that is the same in every process, on every machine and for every Arrow layout.

    Equal numbers have equal hashes whatever their integer type; a string has another one than the number that it spells. Two different
    numbers never collide; n different strings collide with a probability of about n² / 2⁶⁵. Not for adversaries: whoever knows the
    function can construct collisions.

    Args:
        values: strings, binary or integers, dictionary-encoded or not. What a null gets has no meaning.
        seed: another seed is another function.

    Raises:
        SchemaError: another type.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if pa.types.is_dictionary(values.type):
        codes = pc.fill_null(values.indices, 0).to_numpy(zero_copy_only=False).astype(np.int64)
        return hash64(values.dictionary, seed)[codes] if len(values.dictionary) else np.zeros(len(codes), dtype=np.uint64)
    key = _mix(np.array([seed], dtype=np.int64).view(np.uint64))
    if pa.types.is_integer(values.type):
        numbers = pc.fill_null(values, 0).to_numpy(zero_copy_only=False)
        wide = numbers if numbers.dtype == np.uint64 else numbers.astype(np.int64).view(np.uint64)
        return _mix(wide ^ key)
    kind = str(values.type)
    if kind in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view"):
        wide_type = pa.large_string() if "string" in kind else pa.large_binary()
        return _mix(_hash_bytes(pc.fill_null(values.cast(wide_type), "" if "string" in kind else b"")) ^ key)
    raise SchemaError(f"ids: expected strings, binary or integers, got {values.type}")


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
