# SPDX-License-Identifier: Apache-2.0
"""Metrics of a list, from the ranks of its targets.

A rank is 1 for the best place and infinity for an item that is not in the list. Under ties it may be an average, such as 2.5
(see `recsys.evaluation.full_ranking.target_ranks`); a metric takes it as it is, so 2.5 is within the best 3 and not within the best 2.

Without ``offsets``, every rank is an event of its own with one target, and the result has one value for each rank. With ``offsets``,
Values stay apart, so that means and their intervals can be clustered by user.
"""

from typing import Any

import numpy as np


def recall_at(ranks: Any, k: int, offsets: Any = None) -> np.ndarray:
    """Recall@k = targets within the best k / all targets of the list: float64 ``[M]``, or ``[B]`` with ``offsets``.

    With one target this is the hit rate. Note that a list of more than k targets cannot reach 1.
    """
    ranks, offsets = _check(ranks, k, offsets)
    hits = (ranks <= k).astype(np.float64)
    return hits if offsets is None else _ratio(_sums(hits, offsets), np.diff(offsets).astype(np.float64))


def ndcg_at(ranks: Any, k: int, offsets: Any = None) -> np.ndarray:
    """NDCG@k = DCG / ideal DCG with DCG = Σ 1 / log2(1 + rank) over the targets within the best k, gains being 0 or 1.

    Järvelin & Kekäläinen, TOIS 2002, with the logarithmic discount from the first place on. The ideal list is cut off at k as well:
    Σ_{i=1}^{min(targets, k)} 1 / log2(1 + i).

    Returns:
        float64 ``[M]``, or ``[B]`` with ``offsets``.
    """
    ranks, offsets = _check(ranks, k, offsets)
    gains = np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)
    if offsets is None:
        return gains
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])
    return _ratio(_sums(gains, offsets), ideal[np.minimum(np.diff(offsets), k)])


def mrr(ranks: Any, k: int | None = None, offsets: Any = None) -> np.ndarray:
    """Reciprocal rank 1 / rank of the list's best target, 0 where it is not within the best k (everywhere by default).

    Returns:
        float64 ``[M]``, or ``[B]`` with ``offsets``; its mean is the MRR.
    """
    ranks, offsets = _check(ranks, 1 if k is None else k, offsets)
    reciprocal = np.where(ranks <= (np.inf if k is None else k), 1 / ranks, 0.0)
    if offsets is None:
        return reciprocal
    full = np.diff(offsets) > 0
    best = np.full(len(full), np.nan)
    # Empty lists take no room, so the starts of the others cut all of them apart.
    best[full] = np.maximum.reduceat(reciprocal, offsets[:-1][full]) if full.any() else 0.0
    return best


def _check(ranks: Any, k: int, offsets: Any) -> tuple[np.ndarray, np.ndarray | None]:
    ranks = np.asarray(ranks, dtype=np.float64)
    if ranks.ndim != 1 or np.isnan(ranks).any() or (ranks < 1).any():
        raise ValueError(f"ranks: expected one axis of values of at least 1, got the shape {ranks.shape} and {ranks.ravel()[:5]} ...")
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    if offsets is None:
        return ranks, None
    offsets = np.asarray(offsets)
    if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or offsets[-1] != len(ranks) or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets: expected them to rise from 0 to {len(ranks)}, got {offsets}")
    return ranks, offsets


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The sum of each list."""
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return np.bincount(owner, weights=values, minlength=len(offsets) - 1)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
    return result
