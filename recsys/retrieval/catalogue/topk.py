# SPDX-License-Identifier: Apache-2.0
"""The order of retrieved lists: score descending, then row ascending, as one total order of integers, so that no tie is left to chance."""

import numpy as np

_LAST_ROW = np.uint64(0xFFFFFFFF)


def keys_of(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """uint64 of the scores' shape, in the order of the lists: a better score is a larger key, then a smaller row. Never 0.

    The bits of a float32, with all flipped where it is negative and the sign alone where it is not, are ordered as the numbers are.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0, which is equal but has other bits
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
    return (ordered.astype(np.uint64) << np.uint64(32)) | (_LAST_ROW - rows.astype(np.uint64))


def scores_of(keys: np.ndarray) -> np.ndarray:
    """float32: the scores of `keys_of`; -inf for a key of 0."""
    ordered = (keys >> np.uint64(32)).astype(np.uint32)
    scores = np.where(ordered >> 31, ordered & np.uint32(0x7FFFFFFF), ~ordered).view(np.float32)
    return np.where(keys > 0, scores, np.float32(-np.inf))


def best(keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores ``[B, k]`` of the k largest `keys_of` ``[B, C]``, largest first; a key of 0 is no item."""
    if keys.shape[1] > k:
        keys = np.partition(keys, keys.shape[1] - k, axis=1)[:, -k:]
    keys = np.sort(keys, axis=1)[:, ::-1]
    keys = np.pad(keys, ((0, 0), (0, k - keys.shape[1])))
    rows = (_LAST_ROW - (keys & _LAST_ROW)).astype(np.int64)
    return np.where(keys > 0, rows, -1), scores_of(keys)
