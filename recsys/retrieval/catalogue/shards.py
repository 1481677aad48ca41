# SPDX-License-Identifier: Apache-2.0
"""A catalogue in several parts, each with an index of its own: what the parts answer becomes what an index of the whole would answer.

A part is a range of rows. It numbers them from 0, and its list says which of them are best; the k best of all parts' k best are the k
best of the whole, since an item that k others of its own part precede has no place there. That holds for ties as well, as all indexes order
by score, then row, and a range keeps the order of rows. It holds for exact indexes (``dense``, whose scores may differ in their last bit
between parts and whole as they do between batch sizes; ``gather``, whose bits are the same) and for a beam that is nowhere cut. Of a search
that may miss an item, the merged lists miss no more than the parts did.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from recsys.core.errors import DataError
from recsys.retrieval.catalogue.index import check_k
from recsys.retrieval.catalogue.topk import best, keys_of


def ranges(rows: int, parts: int) -> tuple[range, ...]:
    """The rows of each part: as many in one as in another, or one less.

    Raises:
        DataError: there is not at least one part.
    """
    if parts < 1:
        raise DataError(f"parts: expected at least 1, got {parts}")
    bounds = [part * rows // parts for part in range(parts + 1)]
    return tuple(range(first, last) for first, last in pairwise(bounds))


def merge(lists: Sequence[tuple[np.ndarray, np.ndarray]], firsts: Sequence[int], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of what each part found, as `Index.search` of the whole gives them.

    Args:
        lists: of each part rows int64 ``[B, C]``, numbered within it, -1 for none, and scores float32 ``[B, C]``; C, which may differ, at
            least k or all rows of the part.
        firsts: the row of the whole that is each part's row 0.
        k: length of the lists.

    Returns:
        Rows of the whole int64 ``[B, k]`` and scores float32 ``[B, k]``, best first, then smaller rows; -1 and -inf where there is no more.

    Raises:
        DataError: k, or the number or shape of what is given, does not fit.
    """
    check_k(k)
    if not lists or len(lists) != len(firsts):
        raise DataError(f"lists: expected at least one, and a first row for each, got {len(lists)} and {len(firsts)}")
    users = len(lists[0][0])
    for rows, scores in lists:
        if rows.ndim != 2 or rows.shape != scores.shape or len(rows) != users:
            raise DataError(f"lists: expected rows and scores of one shape [{users}, C], got {list(rows.shape)} and {list(scores.shape)}")
    keys = np.concatenate([_keys(rows, scores, first) for (rows, scores), first in zip(lists, firsts, strict=True)], axis=1)
    return best(keys, k)


def merge_log_partitions(parts: Sequence[np.ndarray]) -> np.ndarray:
    """float32 ``[B]``: `Index.log_partition` of the whole from that ``[B]`` of each part, -inf where a part has no item."""
    merged: np.ndarray = np.logaddexp.reduce(np.asarray(parts, np.float64), axis=0).astype(np.float32)
    return merged


def _keys(rows: np.ndarray, scores: np.ndarray, first: int) -> np.ndarray:
    """uint64 ``[B, C]``: `keys_of` the whole's rows, 0 where there is none."""
    keys = keys_of(scores.astype(np.float32, copy=False), np.maximum(rows, 0) + first)
    keys[rows < 0] = 0
    return keys
