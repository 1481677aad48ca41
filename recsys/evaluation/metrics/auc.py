# SPDX-License-Identifier: Apache-2.0
"""Area under the ROC curve."""

from typing import Any

import numpy as np

from recsys.evaluation.metrics.inputs import binary_labels, vector, weights_or_ones


class WeightedAUC:
    """The AUC of fixed scores as a function of weights: the scores are sorted once, so that a bootstrap can ask many times.

    Args:
        labels: ``[N]``, 0 or 1.
        scores: ``[N]``; infinities are allowed, NaN is not.
    """

    def __init__(self, labels: Any, scores: Any) -> None:
        labels = binary_labels(labels)
        scores = vector(scores, "scores", len(labels))
        self._order = np.argsort(scores, kind="stable")
        self._positive = labels[self._order]
        ascending = scores[self._order]
        # A tie is a run of equal scores; without any, the runs need not be summed.
        self._starts = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]])) if len(scores) else np.zeros(0, int)
        self._ties = len(self._starts) < len(scores)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """The AUC under each row of ``weights`` ``[..., N]``: float64 ``[...]``, NaN where a class has no weight."""
        if weights.shape[-1] != len(self._order):
            raise ValueError(f"weights: expected {len(self._order)} values in the last axis, got the shape {weights.shape}")
        if not len(self._order):
            return np.full(weights.shape[:-1], np.nan)
        total = weights[..., self._order].astype(np.float64, copy=False)
        positive = total * self._positive
        negative = total - positive
        if self._ties:
            positive = np.add.reduceat(positive, self._starts, axis=-1)
            negative = np.add.reduceat(negative, self._starts, axis=-1)
        below = np.cumsum(negative, axis=-1)
        pairs = positive.sum(axis=-1) * below[..., -1]
        won = (positive * (below - 0.5 * negative)).sum(axis=-1)
        result: np.ndarray = np.divide(won, pairs, out=np.full(np.shape(pairs), np.nan), where=pairs > 0)
        return result


def auc(labels: Any, scores: Any, weights: Any = None) -> float:
    """The probability that a positive event is scored above a negative one.

    AUC = Σ over pairs (i positive, j negative) of w_i · w_j · ([s_i > s_j] + ½ · [s_i = s_j]), divided by Σ of w_i · w_j.

    Args:
        labels: ``[N]``, 0 or 1.
        scores: ``[N]``.
        weights: ``[N]``, at least 0; ones by default.

    Returns:
        A value from 0 to 1. Ties count ½, as in scikit-learn, so a constant score has 0.5. NaN where one class is absent.
    """
    metric = WeightedAUC(labels, scores)
    return float(metric(weights_or_ones(weights, np.size(labels))))
