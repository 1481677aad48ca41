# SPDX-License-Identifier: Apache-2.0
"""How two opinions become one list."""

import numpy as np

_SMALLEST = 1e-12


def combine(log_probability: np.ndarray, probability: np.ndarray, rank_weight: float) -> np.ndarray:
    """``log P(item | history) + λ · log P(label | item, user)``, elementwise.

    With λ = 1 this is the log-probability that the user takes the item next *and* that the label holds, if both models are calibrated
    and the label is independent of the choice given the features; λ is chosen on the validation period because neither is exactly so.
    """
    return np.asarray(log_probability + rank_weight * np.log(np.maximum(probability, _SMALLEST)))


def top(score: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """The places of the ``k`` best finite scores of one list, best first; equal scores in the order of their catalogue rows."""
    order = np.lexsort((rows, -score))
    best: np.ndarray = order[np.isfinite(score[order])][:k]
    return best
