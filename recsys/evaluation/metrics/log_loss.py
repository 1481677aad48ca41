# SPDX-License-Identifier: Apache-2.0
"""Binary cross-entropy."""

from typing import Any

import numpy as np

from recsys.evaluation.metrics.inputs import unit_interval, weights_or_ones

EPSILON = float(np.finfo(np.float64).eps)


def cross_entropy(labels: Any, probabilities: Any) -> np.ndarray:
    """The loss of each event in nats, −y ln p − (1 − y) ln(1 − p): float64 ``[N]``.

    Args:
        labels: ``[N]``, from 0 to 1.
        probabilities: ``[N]``, from 0 to 1; clipped to [ε, 1 − ε] with ε = 2.2e-16, as scikit-learn does in float64 (TorchRec: 1e-12).
    """
    y = unit_interval(labels, "labels")
    p = np.clip(unit_interval(probabilities, "probabilities", len(y)), EPSILON, 1 - EPSILON)
    # log1p(-p) and not log(1 - p): a small p keeps its digits.
    loss: np.ndarray = -(y * np.log(p) + (1 - y) * np.log1p(-p))
    return loss


def log_loss(labels: Any, probabilities: Any, weights: Any = None) -> float:
    """The mean binary cross-entropy in nats: Σ w · (−y ln p − (1 − y) ln(1 − p)) / Σ w.

    Args:
        labels: ``[N]``, from 0 to 1.
        probabilities: ``[N]``, from 0 to 1, clipped as in `cross_entropy`.
        weights: ``[N]``, at least 0; ones by default.

    Returns:
        At least 0; NaN where there is no weight.
    """
    loss = cross_entropy(labels, probabilities)
    w = weights_or_ones(weights, len(loss))
    return float((w * loss).sum() / w.sum()) if w.sum() > 0 else float("nan")
