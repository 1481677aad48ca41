# SPDX-License-Identifier: Apache-2.0
"""Stable 64-bit hashes of ids: the same in every process, on every machine and with every version of a library."""

import hashlib
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core.errors import SchemaError

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


def is_sampled(key: str, share: float) -> bool:
    """Whether a key belongs to a sample: the same answer in every process and at every time, so that all that has this key is there."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") < share * 2**64
