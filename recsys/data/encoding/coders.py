# SPDX-License-Identifier: Apache-2.0
"""From values to rows of an embedding table: row 0 for no value, row 1 for an unknown one, the known ones from row 2 on."""

from typing import Protocol

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

NO_VALUE, UNKNOWN, FIRST = 0, 1, 2


class Coder(Protocol):
    """Maps values to rows."""

    @property
    def rows(self) -> int:
        """The number of rows of its table."""
        ...

    def encode(self, values: pa.Array) -> np.ndarray:
        """int64 ``[N]``: the row of each value; 0 for a null."""
        ...


class StringCoder:
    """Rows of a vocabulary of strings: value i has row i + 2.

    pyarrow's ``index_in`` would hash the whole vocabulary at every call, which a request of a few hundred rows cannot afford. Here the
    hashes of the vocabulary are put into slots once; a call hashes its own values only, and compares the strings where hashes meet.

    Args:
        vocabulary: large_string ``[V]``, distinct and without nulls.
    """

    def __init__(self, vocabulary: pa.Array) -> None:
        self._seed, hashes = _distinct_hashes(vocabulary)
        self._slots = _Slots(hashes)
        self._vocabulary = vocabulary

    @property
    def rows(self) -> int:
        """The number of rows of its table."""
        return FIRST + len(self._vocabulary)

    def encode(self, values: pa.Array) -> np.ndarray:
        """int64 ``[N]``: the row of each of the N strings (large_string)."""
        if len(self._vocabulary) == 0 or len(values) == 0:
            return np.where(values.is_valid().to_numpy(zero_copy_only=False), UNKNOWN, NO_VALUE)
        candidates = self._slots.find(_hash(values, self._seed))
        same = pc.equal(self._vocabulary.take(pa.array(candidates)), values)
        if not values.null_count:
            return np.where(same.to_numpy(zero_copy_only=False), candidates + FIRST, UNKNOWN)
        rows = np.where(same.fill_null(False).to_numpy(zero_copy_only=False), candidates + FIRST, UNKNOWN)
        rows[values.is_null().to_numpy(zero_copy_only=False)] = NO_VALUE
        return rows


class _Slots:
    """Where each of some distinct hashes stands: open addressing by their upper bits, at most three quarters full.

    Args:
        hashes: uint64 ``[V]``, distinct, V ≥ 1.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        bits = (len(hashes) * 4 // 3).bit_length()
        self._shift, self._mask = np.uint64(64 - bits), (1 << bits) - 1
        self._hashes = hashes
        self._places = np.full(1 << bits, -1, dtype=np.int32 if bits < 32 else np.int64)
        waiting, slots = np.arange(len(hashes)), self._first(hashes)
        while len(waiting):
            free = self._places[slots] < 0
            self._places[slots[free]] = waiting[free]  # of several that want one slot, the last has it
            left = self._places[slots] != waiting
            waiting, slots = waiting[left], (slots[left] + 1) & self._mask

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """int64 ``[N]``: the place of each hash (uint64); that of some other one where it is none of them."""
        slots = self._first(hashes)
        found = self._places[slots]
        left = np.flatnonzero((self._hashes[found] != hashes) & (found >= 0))
        while len(left):
            slots[left] = (slots[left] + 1) & self._mask
            found[left] = self._places[slots[left]]
            left = left[(self._hashes[found[left]] != hashes[left]) & (found[left] >= 0)]
        return np.asarray(np.maximum(found, 0), dtype=np.int64)

    def _first(self, hashes: np.ndarray) -> np.ndarray:
        return np.asarray(hashes >> self._shift, dtype=np.int64)


def look_up(coder: Coder, values: pa.Array) -> np.ndarray:
    """int64 ``[N]``: the row of each value, which may be a dictionary's; each value of a dictionary is then looked up once."""
    if not pt.is_dictionary(values.type):
        return coder.encode(values)
    plain = pa.large_string()
    if len(values.dictionary) > len(values):
        return coder.encode(values.cast(plain))
    rows = np.append(coder.encode(values.dictionary.cast(plain)), NO_VALUE)
    indices = values.indices if not values.indices.null_count else values.indices.cast(pa.int64()).fill_null(len(rows) - 1)
    return np.asarray(rows[indices.to_numpy()])


class BucketCoder:
    """Rows of buckets: a finite x with ``edges[i - 1] <= x < edges[i]`` has row i + 2.

    Args:
        edges: float64 ``[E]``, ascending; there are E + 1 buckets.
    """

    def __init__(self, edges: np.ndarray) -> None:
        self._edges = edges

    @property
    def rows(self) -> int:
        """The number of rows of its table."""
        return FIRST + len(self._edges) + 1

    def encode(self, values: pa.Array) -> np.ndarray:
        """int64 ``[N]``: the row of each of the N numbers (float64); 0 for a null and for a number that is not finite."""
        numbers = values.fill_null(np.nan).to_numpy(zero_copy_only=False)
        return np.where(np.isfinite(numbers), np.searchsorted(self._edges, numbers, side="right") + FIRST, NO_VALUE)


class NumberCoder:
    """Rows of given distinct numbers: number i has row i + 2.

    Args:
        numbers: float64 ``[V]``, distinct.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        self._order = np.argsort(numbers)
        self._sorted = numbers[self._order]

    @property
    def rows(self) -> int:
        """The number of rows of its table."""
        return FIRST + len(self._sorted)

    def encode(self, values: pa.Array) -> np.ndarray:
        """int64 ``[N]``: the row of each of the N numbers (float64); 0 for a null and for a number that is not finite."""
        numbers = values.fill_null(np.nan).to_numpy(zero_copy_only=False)
        rows = np.full(len(numbers), UNKNOWN, dtype=np.int64)
        if len(self._sorted):
            places = np.minimum(np.searchsorted(self._sorted, numbers), len(self._sorted) - 1)
            known = self._sorted[places] == numbers
            rows[known] = self._order[places[known]] + FIRST
        rows[~np.isfinite(numbers)] = NO_VALUE
        return rows


def vocabulary(values: pa.ChunkedArray, min_count: int) -> pa.Array:
    """The distinct values that occur at least ``min_count`` times, the most frequent first and equally frequent ones by value.

    Args:
        values: large_string; nulls are left out.
        min_count: the least number of occurrences.
    """
    table = pa.Table.from_struct_array(values.value_counts())
    table = table.filter(pc.and_(pc.is_valid(table["values"]), pc.greater_equal(table["counts"], min_count)))
    table = table.sort_by([("counts", "descending"), ("values", "ascending")])
    return table["values"].combine_chunks()


def quantile_edges(numbers: np.ndarray, buckets: int) -> np.ndarray:
    """float64 ``[E]``, E < ``buckets``: the ascending inner edges of equally filled buckets of ``numbers`` (finite).

    Edges are observed values. One that several quantiles share counts once, and none lies at the minimum, below which nothing is.
    """
    if len(numbers) == 0:
        return np.empty(0)
    edges = np.quantile(numbers, np.arange(1, buckets) / buckets, method="higher")
    return np.unique(edges[edges > numbers.min()])


def _hash(values: pa.Array, seed: int) -> np.ndarray:
    hashed = pl.from_arrow(values)
    assert isinstance(hashed, pl.Series)
    # Of a frame of one column, since a series is hashed through a query, whose making takes as long as a thousand strings.
    return hashed.to_frame().hash_rows(seed).to_numpy()


def _distinct_hashes(vocabulary: pa.Array) -> tuple[int, np.ndarray]:
    """Hashes that differ for different values, and the seed that gives them. The first seed serves, but for a chance of V²/2⁶⁵."""
    for seed in range(100):
        hashes = _hash(vocabulary, seed) if len(vocabulary) else np.empty(0, dtype=np.uint64)
        if len(np.unique(hashes)) == len(hashes):
            return seed, hashes
    raise ValueError("the values of a vocabulary are not distinct")
