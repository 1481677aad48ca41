# SPDX-License-Identifier: Apache-2.0
"""How certain a difference is: paired bootstrap over users.

Events of one user resemble each other, so users, not events, are drawn again with replacement (the cluster bootstrap; Field & Welsh,
JRSS-B 2007). Both models are measured on the same draw, so what makes a user hard for both cancels. Intervals are percentiles of the
drawn differences; with fewer than some 50 users they are a little too narrow.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from recsys.evaluation.metrics.auc import WeightedAUC
from recsys.evaluation.metrics.inputs import vector, weights_or_ones

WeightedMetric = Callable[[np.ndarray], np.ndarray]

_BUDGET = 1 << 22  # numbers in a block of draws
_UNDEFINED = 0.05  # the share of draws that may have no value, such as the AUC of one class


@dataclass(frozen=True)
class Interval:
    """An estimate between the ends of its interval.

    Attributes:
        estimate: from all events, each once.
        low: the lower end.
        high: the upper end.
        level: the share of such intervals that hold the truth, such as 0.95.
    """

    estimate: float
    low: float
    high: float
    level: float

    def above(self, value: float = 0.0) -> bool:
        """Whether the whole interval lies above ``value``."""
        return self.low > value

    def below(self, value: float = 0.0) -> bool:
        """Whether the whole interval lies below ``value``."""
        return self.high < value

    def __str__(self) -> str:
        return f"{self.estimate:+.4f} [{self.low:+.4f}, {self.high:+.4f}] at {self.level:.0%}"


def bootstrap_mean(
    values: Any, clusters: Any, *, weights: Any = None, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The mean of one value for each event, Σ w · v / Σ w, with its interval over clusters.

    Args:
        values: ``[N]``, such as the `recall_at` of each event, or the AUC of each user.
        clusters: ``[N]``, such as user ids.
        weights: ``[N]``, at least 0; ones by default.
        resamples: how many draws.
        level: of the interval.
        seed: of the draws.
    """
    values = vector(values, "values")
    weights = weights_or_ones(weights, len(values))
    code, count = _clusters(clusters, len(values))
    sums = np.stack([np.bincount(code, weights=weights * values, minlength=count), np.bincount(code, weights=weights, minlength=count)])
    # A draw is a number of times for each user, so a resampled mean is a ratio of two inner products with the users' sums.
    drawn = [draws @ sums.T for draws in _draws(count, resamples, seed, _BUDGET // count)]
    above, below = np.concatenate(drawn).T
    means = np.divide(above, below, out=np.full(resamples, np.nan), where=below > 0)
    return _interval(float(sums[0].sum() / sums[1].sum()), means, level)


def paired_mean_difference(
    ours: Any, theirs: Any, clusters: Any, *, weights: Any = None, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The difference of two means over the same events, ours less theirs, with its paired interval over clusters.

    For metrics that are means of one value for each event: recall, NDCG, log loss (`cross_entropy`), and, with the groups as events and
    their impressions as weights, GAUC. The arguments are those of `bootstrap_mean`.
    """
    ours = vector(ours, "ours")
    theirs = vector(theirs, "theirs", len(ours))
    return bootstrap_mean(ours - theirs, clusters, weights=weights, resamples=resamples, level=level, seed=seed)


def paired_metric_difference(
    ours: WeightedMetric, theirs: WeightedMetric, clusters: Any, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The difference of any two metrics that take weights, ours less theirs, with its paired interval over clusters.

    Args:
        ours: from weights ``[R, N]`` of the events to the metric ``[R]``, such as a `WeightedAUC`. Drawing an event twice is to give it
            twice the weight.
        theirs: the same of the other model.
        clusters: ``[N]``, such as user ids.
        resamples: how many draws.
        level: of the interval.
        seed: of the draws.
    """
    code, count = _clusters(clusters, len(np.asarray(clusters)))
    once = np.ones((1, len(code)))
    estimate = float((ours(once) - theirs(once))[0])
    differences = []
    for draws in _draws(count, resamples, seed, _BUDGET // len(code)):
        weights = draws[:, code]
        differences.append(ours(weights) - theirs(weights))
    return _interval(estimate, np.concatenate(differences), level)


def paired_auc_difference(
    labels: Any, ours: Any, theirs: Any, clusters: Any, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """AUC of the scores ``ours`` less that of ``theirs`` on the same labels, with its paired interval over clusters.

    Scores are sorted once, so a draw costs a few passes over the events.
    """
    metrics = WeightedAUC(labels, ours), WeightedAUC(labels, theirs)
    if np.shape(clusters) != np.shape(labels):
        raise ValueError(f"clusters: expected the shape {np.shape(labels)}, got {np.shape(clusters)}")
    return paired_metric_difference(*metrics, clusters, resamples=resamples, level=level, seed=seed)


def _clusters(clusters: Any, length: int) -> tuple[np.ndarray, int]:
    """The number of each event's cluster, and how many clusters there are."""
    if np.shape(clusters) != (length,):
        raise ValueError(f"clusters: expected one for each of the {length} events, got the shape {np.shape(clusters)}")
    if not length:
        raise ValueError("bootstrap: expected at least one event, got none")
    names, code = np.unique(np.asarray(clusters), return_inverse=True)
    return code, len(names)


def _draws(count: int, resamples: int, seed: int, block: int) -> Iterator[np.ndarray]:
    """How often each of ``count`` clusters is drawn: float64 ``[at most block, count]``, ``resamples`` rows in all."""
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    block = max(1, block)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        chosen = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(chosen.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def _interval(estimate: float, drawn: np.ndarray, level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a value between 0 and 1, got {level}")
    undefined = np.isnan(drawn)
    if np.isnan(estimate) or undefined.mean() > _UNDEFINED:
        raise ValueError(
            f"bootstrap: the metric is undefined on {int(undefined.sum())} of {len(drawn)} draws "
            f"(and is {estimate:g} on all events), for instance because one class is absent"
        )
    low, high = np.quantile(drawn[~undefined], [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), level)
