# SPDX-License-Identifier: Apache-2.0
"""What another policy would have earned, from impressions of the one that served.

Every impression carries its propensity, the probability of its place under the policy that served. Weighting what it earned by
``target / propensity`` makes the sum that of the target policy in expectation, if every place that the target may fill had a chance to be
logged (Horvitz & Thompson, 1952; in recommendation: Gilotte et al., arXiv 1801.07030). Impressions of one request resemble each other, so
intervals are over clusters (requests or users).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys.evaluation.bootstrap import Interval, bootstrap_mean
from recsys.evaluation.metrics.inputs import unit_interval, vector


@dataclass(frozen=True)
class OffPolicy:
    """An estimate of what the target policy earns with an impression.

    Attributes:
        interval: the estimate with its interval over clusters.
        effective_size: ``(Σ w)² / Σ w²``: how many impressions of equal weight say as much. Far below ``count``, the estimate hangs on few.
        clipped: the share of impressions whose weight was cut.
        largest_weight: before any was cut.
        count: impressions.
    """

    interval: Interval
    effective_size: float
    clipped: float
    largest_weight: float
    count: int


@dataclass(frozen=True)
class _Weights:
    """Weights as they are used, and as they were."""

    used: np.ndarray
    raw: np.ndarray

    def result(self, interval: Interval) -> OffPolicy:
        square, cut = float((self.used**2).sum()), self.used < self.raw
        size = float(self.used.sum()) ** 2 / square if square else 0.0
        return OffPolicy(interval, size, float(cut.mean()), float(self.raw.max()), len(self.raw))


def inverse_propensity(
    reward: Any, propensity: Any, target: Any, clusters: Any, *, clip: float | None = None, **interval: Any
) -> OffPolicy:
    """The mean of ``w · reward`` (IPS): unbiased; its variance grows with the weights. With ``clip``, biased towards 0 for rewards above 0.

    Args:
        reward: ``[N]``, such as the label of each impression.
        propensity: ``[N]`` in (0, 1], of each impression under the policy that served.
        target: ``[N]`` in [0, 1], of the same impression under the policy that is asked about.
        clusters: ``[N]``, such as request ids.
        clip: the largest weight; none by default.
        interval: ``resamples``, ``level`` and ``seed`` of `recsys.evaluation.bootstrap.bootstrap_mean`.

    Raises:
        ValueError: the lengths differ, a probability is out of range, or ``clip`` is not above 0.
    """
    weights = _weights(propensity, target, clip)
    reward = vector(reward, "reward", len(weights.raw))
    return weights.result(bootstrap_mean(weights.used * reward, clusters, **interval))


def self_normalised(reward: Any, propensity: Any, target: Any, clusters: Any, *, clip: float | None = None, **interval: Any) -> OffPolicy:
    """``Σ w · reward / Σ w`` (SNIPS; Swaminathan & Joachims, NeurIPS 2015): its bias vanishes with N.

    It stays within the range of the rewards.

    The arguments are those of `inverse_propensity`.

    Raises:
        ValueError: likewise; or the target fills none of the places that were logged.
    """
    weights = _weights(propensity, target, clip)
    reward = vector(reward, "reward", len(weights.raw))
    if not weights.used.any():
        raise ValueError("target: expected a probability above 0 for one impression at least; all are 0")
    return weights.result(bootstrap_mean(reward, clusters, weights=weights.used, **interval))


def doubly_robust(
    reward: Any,
    propensity: Any,
    target: Any,
    predicted: Any,
    expected: Any,
    clusters: Any,
    *,
    clip: float | None = None,
    **interval: Any,
) -> OffPolicy:
    """The mean of ``expected + w · (reward − predicted)`` (DR; Dudík et al., arXiv 1103.4601).

    Unbiased if either the propensities or the predictions are right.

    Args:
        reward: see `inverse_propensity`, as the others that are not named here.
        propensity: likewise.
        target: likewise.
        predicted: ``[N]``, what a model expects of each impression as it was served.
        expected: ``[N]``, what the same model expects of the target policy in its place: the mean over what the target could show there.
        clusters: see above.
        clip: see above.
        interval: see above.
    """
    weights = _weights(propensity, target, clip)
    reward, predicted, expected = (
        vector(values, name, len(weights.raw)) for values, name in ((reward, "reward"), (predicted, "predicted"), (expected, "expected"))
    )
    return weights.result(bootstrap_mean(expected + weights.used * (reward - predicted), clusters, **interval))


def _weights(propensity: Any, target: Any, clip: float | None) -> _Weights:
    propensity = unit_interval(propensity, "propensity")
    target = unit_interval(target, "target", len(propensity))
    if not propensity.all():
        raise ValueError("propensity: expected values above 0: what had no chance to be logged was not logged")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: expected a weight above 0, got {clip}")
    raw = target / propensity
    return _Weights(raw if clip is None else np.minimum(raw, clip), raw)
