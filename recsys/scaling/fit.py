# SPDX-License-Identifier: Apache-2.0
"""Power laws of quality in size, with intervals from resampling seeds.

Two laws are fitted: of a gain over a baseline, ``Δ = c · P^a`` (how the published exponents are given), and of a loss above its floor,
``L = L∞ + c · P^−a`` (Kaplan et al., arXiv 2001.08361; with a floor: Hestness et al., arXiv 1712.00409, Hoffmann et al., arXiv 2203.15556).

Intervals: the seeds of every size are drawn again with replacement, the law is fitted anew, and percentiles are taken. A resampled mean
of n seeds varies too little, by the factor (n − 1)/n in variance; so its distance from the mean is stretched by √(n/(n − 1)).
With three seeds and few sizes intervals are still somewhat too narrow.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit

from recsys.core.errors import DataError
from recsys.evaluation.bootstrap import Interval

Samples = Mapping[float, Sequence[float]]
"""The results of the seeds of each size, by size."""

_UNDEFINED = 0.05  # the share of draws that may have no law
_STEEPEST = 5.0  # the largest exponent of a loss: steeper, its curve is a step between two sizes


@dataclass(frozen=True)
class Law:
    """A fitted law: ``floor + coefficient · P^exponent``, with exponent < 0 for a loss.

    Attributes:
        coefficient: c.
        exponent: a, with the sign that it has in the formula above.
        floor: L∞; 0 for a gain.
        sizes: how many sizes were fitted.
        draws: ``[R, 3]``, coefficient, exponent and floor of each resample.
    """

    coefficient: Interval
    exponent: Interval
    floor: Interval
    sizes: int
    draws: np.ndarray

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        """The fitted value at each size."""
        c, a, floor = self.coefficient.estimate, self.exponent.estimate, self.floor.estimate
        return floor + c * np.asarray(sizes, np.float64) ** a

    def band(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lower and the upper end of the interval of the fitted value at each size."""
        c, a, floor = self.draws.T[:, :, None]
        level = self.exponent.level
        low, high = np.quantile(floor + c * np.asarray(sizes, np.float64) ** a, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return low, high


def fit_gain(values: Samples, baseline: float | Sequence[float], *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Law:
    """``Δ = c · P^a`` for Δ = mean of a size less mean of the baseline, by least squares on ``ln Δ = ln c + a ln P``.

    Args:
        values: a metric of which more is better, such as AUC, of each size's seeds.
        baseline: the same metric of the baseline: a known value, or its seeds, which are then resampled too.
        resamples: how many draws.
        level: of the intervals.
        seed: of the draws.

    Raises:
        DataError: fewer than two sizes; a size without a gain; intervals asked for (``resamples`` > 0) where a size has one seed.
    """
    sizes, means, drawn = _means(values, 2, resamples, seed)
    base, base_drawn = _baseline(baseline, resamples, seed)
    gains = means - base
    if (bad := gains <= 0).any():
        at = ", ".join(f"{size:g} ({gain:+.6f})" for size, gain in zip(sizes[bad], gains[bad], strict=True))
        raise DataError(f"gain: a power law needs a gain over the baseline at every size; there is none at {at}")
    estimate = _log_line(sizes, gains[None])[0]
    drawn_gains = drawn - base_drawn[:, None]
    draws = _log_line(sizes, drawn_gains[_defined((drawn_gains > 0).all(axis=1), "has no gain at some size")])
    return _law(estimate, draws, len(sizes), level)


def fit_loss(values: Samples, *, floor: float | None = None, resamples: int = 300, level: float = 0.95, seed: int = 0) -> Law:
    """``L = L∞ + c · P^−a`` with c > 0, a > 0 and 0 ≤ L∞ < min L, by least squares; with a known ``floor``, on logarithms.

    Args:
        values: a loss of each size's seeds.
        floor: L∞ where it is known, such as the log-loss of the true probabilities.
        resamples: how many draws.
        level: of the intervals.
        seed: of the draws.

    Raises:
        DataError: fewer than three sizes (two with a known floor); the loss does not fall from the smallest size to the largest; a loss at
            or below the known floor; the fit is at the limit of what a curve can be; one seed where intervals are asked for.
    """
    sizes, means, drawn = _means(values, 3 if floor is None else 2, resamples, seed)
    if means[-1] >= means[0]:
        raise DataError(f"loss: it does not fall with size: {means[0]:.6f} at {sizes[0]:g} and {means[-1]:.6f} at {sizes[-1]:g}")
    if floor is None:
        estimate = _curve(sizes, means)
        if estimate is None:
            raise DataError("loss: no curve L∞ + c · P^−a fits: losses fall too abruptly, or do not flatten as a power of size does")
        found = [curve for row in drawn if (curve := _curve(sizes, row, estimate)) is not None]
        if len(found) < (1 - _UNDEFINED) * len(drawn):
            raise DataError(f"loss: the law is undefined on {len(drawn) - len(found)} of {len(drawn)} draws, on which no curve fits")
        return _law(estimate, np.array(found).reshape(-1, 3), len(sizes), level)
    if (means <= floor).any():
        raise DataError(f"loss: {means.min():.6f} is at or below the floor {floor:.6f}")
    kept = drawn[_defined((drawn > floor).all(axis=1), "reaches the floor at some size")]
    estimate, draws = _log_line(sizes, means[None] - floor)[0], _log_line(sizes, kept - floor)
    estimate[2] = draws[:, 2] = floor
    return _law(estimate, draws, len(sizes), level)


def _means(values: Samples, fewest: int, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes in ascending order, the mean of each ``[S]``, and resampled means ``[R, S]``."""
    sizes = np.array(sorted(values), np.float64)
    if len(sizes) < fewest:
        raise DataError(f"sizes: expected at least {fewest} different ones, got {len(sizes)}")
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise DataError(f"sizes: expected finite positive numbers, got {sizes.tolist()}")
    samples = [np.asarray(values[size], np.float64) for size in sizes]
    for size, sample in zip(sizes, samples, strict=True):
        if not len(sample) or not np.isfinite(sample).all():
            raise DataError(f"size {size:g}: expected at least one finite value, got {sample.tolist()}")
        if resamples and len(sample) < 2:
            raise DataError(f"size {size:g}: an interval over seeds needs at least two, got one; more seeds, or resamples=0")
    random = np.random.default_rng([seed, 0])
    drawn = np.stack([_resampled(sample, resamples, random) for sample in samples], axis=1)
    return sizes, np.array([sample.mean() for sample in samples]), drawn


def _baseline(baseline: float | Sequence[float], resamples: int, seed: int) -> tuple[float, np.ndarray]:
    sample = np.atleast_1d(np.asarray(baseline, np.float64))
    if len(sample) < 1 or not np.isfinite(sample).all():
        raise DataError(f"baseline: expected finite values, got {sample.tolist()}")
    return float(sample.mean()), _resampled(sample, resamples, np.random.default_rng([seed, 1]))


def _resampled(sample: np.ndarray, resamples: int, random: np.random.Generator) -> np.ndarray:
    """Means of ``resamples`` draws with replacement, as far from the sample's mean as the variance of a mean of n asks for: ``[R]``."""
    n, mean = len(sample), sample.mean()
    if n == 1:
        return np.full(resamples, mean)
    means = sample[random.integers(n, size=(resamples, n))].mean(axis=1)
    stretched: np.ndarray = mean + (means - mean) * np.sqrt(n / (n - 1))
    return stretched


def _defined(defined: Any, what: str) -> np.ndarray:
    if len(defined) and (~defined).mean() > _UNDEFINED:
        raise DataError(f"seeds: {int((~defined).sum())} of {len(defined)} draws have no law, as the mean {what}: more seeds are needed")
    return np.asarray(defined)


def _log_line(sizes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares of ``ln value`` on ``ln size``, one for each row ``[R, S]``: coefficient, exponent and 0, ``[R, 3]``."""
    x, y = np.log(sizes), np.log(values)
    centred = x - x.mean()
    exponent = y @ centred / (centred @ centred)
    coefficient = np.exp(y.mean(axis=1) - exponent * x.mean())
    return np.stack([coefficient, exponent, np.zeros_like(exponent)], axis=1)


def _curve(sizes: np.ndarray, losses: np.ndarray, near: np.ndarray | None = None) -> np.ndarray | None:
    """Coefficient, exponent and floor of one curve, sought from another; None where it lies at a limit, or none was found."""
    lowest, span = float(losses.min()), float(np.ptp(losses))
    if lowest <= 0 or span <= 0:
        return None
    scale = sizes[0]  # so that the coefficient is the loss above the floor at the smallest size
    x = sizes / scale
    start = (max(0.0, lowest - 0.2 * span), 1.2 * span, 0.5)
    if near is not None:
        start = (min(near[2], 0.999 * lowest), near[0] * scale ** near[1], -near[1])
    limits = ([0.0, 0.0, 1e-4], [lowest, 1e3 * (lowest + span), _STEEPEST])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # an exact fit has no covariance; it is not used
            (floor, c, a), _ = curve_fit(_shape, x, losses, p0=start, bounds=limits, jac=_slopes, x_scale="jac", ftol=1e-9, xtol=1e-9)
    except RuntimeError:
        return None
    if a > 0.99 * _STEEPEST or a < 2e-4:
        return None
    return np.array([c * scale**a, -a, floor])


def _shape(x: np.ndarray, floor: float, coefficient: float, exponent: float) -> np.ndarray:
    result: np.ndarray = floor + coefficient * x**-exponent
    return result


def _slopes(x: np.ndarray, floor: float, coefficient: float, exponent: float) -> np.ndarray:
    power = x**-exponent
    return np.stack([np.ones_like(x), power, -coefficient * power * np.log(x)], axis=1)


def _law(estimate: np.ndarray, draws: np.ndarray, sizes: int, level: float) -> Law:
    """Estimates between percentiles of the draws; without draws the ends are NaN."""
    if not 0 < level < 1:
        raise DataError(f"level: expected a value between 0 and 1, got {level}")
    ends = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0) if len(draws) else np.full((2, 3), np.nan)
    intervals = [Interval(float(e), float(low), float(high), level) for e, low, high in zip(estimate, *ends, strict=True)]
    coefficient, exponent, floor = intervals
    return Law(coefficient, exponent, floor, sizes, draws)
