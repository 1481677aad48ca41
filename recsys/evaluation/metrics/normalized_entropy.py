# SPDX-License-Identifier: Apache-2.0
"""Normalized entropy (normalized cross-entropy)."""

from typing import Any

import numpy as np

from recsys.evaluation.metrics.inputs import weights_or_ones
from recsys.evaluation.metrics.log_loss import cross_entropy


def normalized_entropy(labels: Any, probabilities: Any, base_rate: float | None = None, weights: Any = None) -> float:
    """The log loss divided by that of always predicting the base rate: below 1, the model knows more than the base rate.

    NE = Σ w · CE(y, p) / Σ w · CE(y, q) with q the base rate (He et al., Practical Lessons from Predicting Clicks on Ads at Facebook,
    ADKDD 2014, equation 1; TorchRec's NE is the same with the default q). The base of the logarithm cancels.

    Args:
        labels: ``[N]``, from 0 to 1.
        probabilities: ``[N]``, from 0 to 1, clipped as in `cross_entropy`.
        base_rate: q, such as the positive rate of the training period; by default the weighted mean label of these very events.
        weights: ``[N]``, at least 0; ones by default.

    Returns:
        At least 0; NaN where there is no weight, or where the default q is 0 or 1 (all labels equal).
    """
    if base_rate is not None and not 0 < base_rate < 1:
        raise ValueError(f"base_rate: expected a value between 0 and 1, got {base_rate}")
    loss = cross_entropy(labels, probabilities)
    w = weights_or_ones(weights, len(loss))
    total = w.sum()
    if total <= 0:
        return float("nan")
    rate = float((w * np.asarray(labels, np.float64)).sum() / total)
    q = rate if base_rate is None else base_rate
    if not 0 < q < 1:
        return float("nan")
    background = total * -(rate * np.log(q) + (1 - rate) * np.log1p(-q))
    return float((w * loss).sum() / background)
