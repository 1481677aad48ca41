# SPDX-License-Identifier: Apache-2.0
"""Synthetic impressions of Criteo's shape with planted labels, equal in every process: 13 dense columns, 26 categorical of 100k values.

The label's logit is a sum of hidden effects: of every value of eight fields, of pairs of values in four pairs of fields (what an
interaction must learn), and of four dense columns. Only numpy is needed, since contestants have environments of their own.
"""

from dataclasses import dataclass

import numpy as np

DENSE, FIELDS, ROWS, ZIPF = 13, 26, 100_000, 1.05
_EFFECTS, _PAIRS = 8, ((0, 8), (1, 9), (2, 10), (3, 11))
_BUCKETS = 64  # values of a pair's fields are hashed into so many: each pair has 64 x 64 effects
HELD_OUT = 1 << 40  # the first row of the held-out part


@dataclass(frozen=True)
class Rows:
    """B impressions: float32 ``[B, 13]``, int64 ``[B, 26]``, float32 ``[B]``."""

    dense: np.ndarray
    categorical: np.ndarray
    labels: np.ndarray


class Planted:
    """The source of rows; any block of rows can be drawn by itself."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng([seed, 0])
        weights = 1.0 / np.arange(1, ROWS + 1) ** ZIPF
        self._cumulative = np.cumsum(weights / weights.sum())
        self._permutations = np.argsort(random.random((FIELDS, ROWS)), axis=1)
        self._effects = random.normal(0, 0.45, (_EFFECTS, ROWS))
        self._pairs = random.normal(0, 0.6, (len(_PAIRS), _BUCKETS, _BUCKETS))
        self._dense = random.normal(0, 0.3, 4)
        self._seed = seed

    def rows(self, start: int, count: int) -> Rows:
        """Rows ``start`` to ``start + count - 1``; equal for equal arguments."""
        random = np.random.default_rng([self._seed, 1, start])
        dense = random.normal(0, 1, (count, DENSE)).astype(np.float32)
        ranks = np.minimum(np.searchsorted(self._cumulative, random.random((count, FIELDS))), ROWS - 1)
        categorical = self._permutations[np.arange(FIELDS), ranks].astype(np.int64)
        logit = -1.2 + dense[:, :4] @ self._dense
        for field in range(_EFFECTS):
            logit += self._effects[field, categorical[:, field]]
        for pair, (a, b) in enumerate(_PAIRS):
            logit += self._pairs[pair, categorical[:, a] % _BUCKETS, categorical[:, b] % _BUCKETS]
        labels = (random.random(count) < 1 / (1 + np.exp(-logit))).astype(np.float32)
        return Rows(dense, categorical, labels)


def quality(labels: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """AUC and log-loss, in plain numpy, so that every contestant is measured by the same lines."""
    order = np.argsort(probability, kind="stable")
    ranks = np.empty(len(order))
    ranks[order] = np.arange(1, len(order) + 1)
    _, inverse, counts = np.unique(probability, return_inverse=True, return_counts=True)
    ranks = (np.bincount(inverse, weights=ranks) / counts)[inverse]
    positive = labels > 0.5
    p, n = positive.sum(), (~positive).sum()
    auc = (ranks[positive].sum() - p * (p + 1) / 2) / (p * n)
    clipped = np.clip(probability.astype(np.float64), 1e-7, 1 - 1e-7)
    loss = -np.where(positive, np.log(clipped), np.log1p(-clipped)).mean()
    return {"auc": float(auc), "logloss": float(loss)}
