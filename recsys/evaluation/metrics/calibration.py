# SPDX-License-Identifier: Apache-2.0
"""Whether probabilities mean what they say: overall, and in bins."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from recsys.evaluation.metrics.inputs import unit_interval, weights_or_ones

Strategy = Literal["uniform", "quantile"]


def calibration_ratio(labels: Any, probabilities: Any, weights: Any = None) -> float:
    """Predicted over observed positives, Σ w · p / Σ w · y; 1 is right, above 1 promises too much.

    Args:
        labels: ``[N]``, from 0 to 1.
        probabilities: ``[N]``, from 0 to 1.
        weights: ``[N]``, at least 0; ones by default.

    Returns:
        At least 0; NaN where there is no positive label (TorchRec gives 0).
    """
    y = unit_interval(labels, "labels")
    p = unit_interval(probabilities, "probabilities", len(y))
    w = weights_or_ones(weights, len(y))
    observed = (w * y).sum()
    return float((w * p).sum() / observed) if observed > 0 else float("nan")


@dataclass(frozen=True)
class ReliabilityCurve:
    """Predicted against observed rates of B bins, none of them empty, by rising prediction.

    Attributes:
        predicted: float64 ``[B]``, the mean probability of a bin.
        observed: float64 ``[B]``, its mean label.
        count: int64 ``[B]``, its events.
    """

    predicted: np.ndarray
    observed: np.ndarray
    count: np.ndarray


def reliability_curve(labels: Any, probabilities: Any, bins: int = 10, strategy: Strategy = "quantile") -> ReliabilityCurve:
    """Mean label against mean probability, bin by bin.

    Args:
        labels: ``[N]``, from 0 to 1.
        probabilities: ``[N]``, from 0 to 1.
        bins: at most how many.
        strategy: ``uniform`` cuts [0, 1] into equal widths, ``quantile`` at the quantiles of the probabilities, so that bins are equally
            full. A value at an edge belongs to the bin below it. Equal probabilities never part, so ties make fewer and unequal bins.

    Returns:
        The bins that hold events: none where there are no events.
    """
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    y = unit_interval(labels, "labels")
    p = unit_interval(probabilities, "probabilities", len(y))
    if not len(y):
        return ReliabilityCurve(np.zeros(0), np.zeros(0), np.zeros(0, np.int64))
    inner = np.arange(1, bins) / bins
    edges = inner if strategy == "uniform" else np.quantile(p, inner)
    bin_of = np.searchsorted(edges, p, side="left")
    count = np.bincount(bin_of, minlength=bins)
    full = count > 0
    predicted = np.bincount(bin_of, weights=p, minlength=bins)[full] / count[full]
    observed = np.bincount(bin_of, weights=y, minlength=bins)[full] / count[full]
    return ReliabilityCurve(predicted, observed, count[full])


def expected_calibration_error(labels: Any, probabilities: Any, bins: int = 15, strategy: Strategy = "uniform") -> float:
    """ECE = Σ_b n_b / N · |mean probability − mean label| over the bins of `reliability_curve`.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3, for the probability of the positive class.

    Returns:
        From 0 to 1; NaN where there are no events.
    """
    curve = reliability_curve(labels, probabilities, bins, strategy)
    if not len(curve.count):
        return float("nan")
    return float((curve.count * np.abs(curve.predicted - curve.observed)).sum() / curve.count.sum())
