# SPDX-License-Identifier: Apache-2.0
"""Power laws: planted exponents come back within intervals, published ones follow from published tables, what is no law is refused."""

import numpy as np
import pytest
from scipy.stats import linregress

from recsys.core.errors import DataError
from recsys.scaling.fit import Law, fit_gain, fit_loss

SIZES = (1e4, 4e4, 1.6e5, 6.4e5)


def gains(random: np.random.Generator, *, exponent: float = 0.15, noise: float = 5e-4, seeds: int = 5) -> dict[float, list[float]]:
    """AUC over a baseline of 0.7 by size."""
    return {size: list(0.7 + 0.01 * (size / 1e4) ** exponent + random.normal(0, noise, seeds)) for size in SIZES}


def losses(random: np.random.Generator, *, noise: float = 3e-4, sizes: int = 6, seeds: int = 5) -> dict[float, list[float]]:
    """``0.45 + 0.05 (P / 1e4)^−0.4`` by size."""
    return {size: list(0.45 + 0.05 * (size / 1e4) ** -0.4 + random.normal(0, noise, seeds)) for size in np.geomspace(1e4, 1e7, sizes)}


def test_a_gain_without_noise_is_recovered_exactly() -> None:
    law = fit_gain({p: [0.6 + 0.003 * p**0.12] for p in (5.0, 40.0, 70.0)}, 0.6, resamples=0)
    assert law.exponent.estimate == pytest.approx(0.12, abs=1e-9) and law.coefficient.estimate == pytest.approx(0.003, rel=1e-8)
    assert np.isnan(law.exponent.low) and law.floor.estimate == 0 and law.sizes == 3
    np.testing.assert_allclose(law(np.array([5.0, 70.0])), [0.003 * 5**0.12, 0.003 * 70**0.12])


def test_a_gain_is_the_line_through_logarithms_of_means() -> None:
    values = gains(np.random.default_rng(0))
    line = linregress(np.log(SIZES), np.log([np.mean(values[size]) - 0.7 for size in SIZES]))
    law = fit_gain(values, 0.7)
    assert law.exponent.estimate == pytest.approx(line.slope) and law.coefficient.estimate == pytest.approx(np.exp(line.intercept))
    assert law.exponent.low < law.exponent.estimate < law.exponent.high


def coverage(hits: int, runs: int, level: float) -> None:
    """Within four standard deviations of the level, less a bit for the few seeds that percentiles rest on."""
    assert level - 0.06 - 4 * np.sqrt(level * (1 - level) / runs) < hits / runs <= 1
    assert hits < runs or level > 0.9  # an interval that always holds the truth is too wide


@pytest.mark.parametrize("level", [0.6, 0.9])
def test_intervals_of_a_gain_hold_the_truth_about_as_often_as_they_say(level: float) -> None:
    random, hits = np.random.default_rng(1), 0
    for _ in range(200):
        law = fit_gain(gains(random), 0.7, resamples=200, level=level)
        hits += law.exponent.low < 0.15 < law.exponent.high
    coverage(hits, 200, level)
    assert hits / 200 < level + 4 * np.sqrt(level * (1 - level) / 200)


def test_intervals_of_a_loss_hold_the_truth() -> None:
    random, hits = np.random.default_rng(2), 0
    for _ in range(8):
        law = fit_loss(losses(random), resamples=60, level=0.9)
        hits += law.exponent.low < -0.4 < law.exponent.high and law.floor.low < 0.45 < law.floor.high
    assert hits >= 4


def test_the_seeds_of_a_baseline_widen_the_interval() -> None:
    values = gains(np.random.default_rng(3))
    known, measured = (fit_gain(values, base) for base in (0.7, [0.698, 0.699, 0.7, 0.701, 0.702]))
    assert measured.exponent.high - measured.exponent.low > 1.2 * (known.exponent.high - known.exponent.low)
    assert measured.exponent.estimate == pytest.approx(known.exponent.estimate)


def test_more_seeds_narrow_the_interval() -> None:
    few, many = (fit_gain(gains(np.random.default_rng(4), seeds=n), 0.7).exponent for n in (4, 64))
    assert 2 < (few.high - few.low) / (many.high - many.low) < 8  # √16 in expectation


def test_a_loss_without_noise_is_recovered() -> None:
    law = fit_loss({p: [0.45 + 0.05 * (p / 1e4) ** -0.4] for p in (1e4, 1e5, 1e6, 1e7)}, resamples=0)
    assert law.exponent.estimate == pytest.approx(-0.4, abs=1e-4) and law.floor.estimate == pytest.approx(0.45, abs=1e-5)
    np.testing.assert_allclose(law(np.array([1e4, 1e7])), [0.5, 0.45 + 0.05 * 1000**-0.4], atol=1e-6)


def test_a_known_floor_needs_two_sizes_and_is_exact() -> None:
    law = fit_loss({p: [0.45 + 3.0 * p**-0.3] * 2 for p in (1e4, 1e6)}, floor=0.45, resamples=20)
    assert law.exponent.estimate == pytest.approx(-0.3) and law.coefficient.estimate == pytest.approx(3.0)
    assert law.floor.low == law.floor.high == 0.45


def test_a_band_holds_the_curve_and_is_narrowest_in_the_middle() -> None:
    law = fit_gain(gains(np.random.default_rng(5)), 0.7)
    xs = np.geomspace(1e3, 1e7, 9)
    low, high = law.band(xs)
    assert (low < law(xs)).all() and (law(xs) < high).all()
    width = np.log(high / low)
    assert width[4] < width[0] and width[4] < width[-1]


# --- published numbers


@pytest.mark.parametrize(("millions", "gain", "exponent"), [(4600, 1.14, 0.0870), (7600, 1.20, 0.0898)])
def test_tokenmixer_large_by_two_points(millions: float, gain: float, exponent: float) -> None:
    """arXiv 2602.06563, table 2: CTCVR AUC over DLRM-MLP-500M, from 501M."""
    law = fit_gain({501.0: [0.94], millions: [gain]}, 0.0, resamples=0)
    assert law.exponent.estimate == pytest.approx(exponent, abs=5e-5)


@pytest.mark.parametrize(
    ("rows", "coefficient", "exponent", "tolerance"),
    [
        ({4.44: 0.747772, 135.5: 0.749329}, 0.002718, 0.116043, 2e-4),
        ({6.57: 0.748464, 67.5: 0.749770, 101.5: 0.750238}, 0.003032, 0.131973, 1e-3),
        ({4.97: 0.749228, 42.4: 0.751121, 76.2: 0.751401}, 0.003767, 0.141903, 4e-3),
    ],
    ids=["rankmixer", "unimixer", "unimixing_lite"],
)
def test_unimixer_s_published_laws_follow_from_its_tables(
    rows: dict[float, float], coefficient: float, exponent: float, tolerance: float
) -> None:
    """arXiv 2604.00590: AUC of models of two blocks over heterogeneous attention (0.744577), parameters in millions.

    The published fits rest on more points than the tables show, so exponents agree within ``tolerance`` only.
    """
    law = fit_gain({size: [auc] for size, auc in rows.items()}, 0.744577, resamples=0)
    assert law.exponent.estimate == pytest.approx(exponent, abs=tolerance)
    assert law.coefficient.estimate == pytest.approx(coefficient, rel=0.02)
    for size, auc in rows.items():
        assert coefficient * size**exponent == pytest.approx(auc - 0.744577, abs=1.5e-4)


# --- what is not a law


@pytest.mark.parametrize(
    ("values", "baseline", "message"),
    [
        ({1e4: [0.71, 0.72]}, 0.7, "at least 2 different ones, got 1"),
        ({1e4: [0.71, 0.72], 1e5: [0.69, 0.70]}, 0.7, r"none at 100000 \(-0.005000\)"),
        ({1e4: [0.71], 1e5: [0.72, 0.73]}, 0.7, "size 10000: an interval over seeds needs at least two"),
        ({1e4: [0.71, float("nan")], 1e5: [0.72, 0.73]}, 0.7, "size 10000: expected at least one finite value"),
        ({0.0: [0.71, 0.71], 1e5: [0.72, 0.73]}, 0.7, "finite positive numbers"),
        ({1e4: [0.69, 0.72], 1e5: [0.72, 0.73]}, 0.7, "draws have no law, as the mean has no gain"),
        ({1e4: [0.71, 0.72], 1e5: [0.72, 0.73]}, float("nan"), "baseline: expected finite"),
    ],
)
def test_gains_without_a_law_are_errors(values: dict, baseline: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_gain(values, baseline)


@pytest.mark.parametrize(
    ("values", "floor", "message"),
    [
        ({1e4: [0.5, 0.5], 1e5: [0.4, 0.4]}, None, "at least 3 different ones, got 2"),
        ({1e4: [0.5, 0.5], 1e5: [0.45, 0.45], 1e6: [0.51, 0.51]}, None, "does not fall with size: 0.500000 at 10000 and 0.510000"),
        ({1e4: [0.5, 0.5], 1e5: [0.4, 0.4]}, 0.45, "at or below the floor 0.45"),
        ({1e4: [0.5, 0.5], 1e5: [0.4, 0.4], 1e6: [0.4, 0.4]}, None, "no curve"),
    ],
)
def test_losses_without_a_law_are_errors(values: dict, floor: float | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_loss(values, floor=floor)


def test_a_level_outside_0_to_1_is_an_error() -> None:
    with pytest.raises(DataError, match="level"):
        fit_gain(gains(np.random.default_rng(0)), 0.7, level=1.0)


def test_draws_are_decided_by_the_seed() -> None:
    values = gains(np.random.default_rng(0))

    def draws(seed: int) -> np.ndarray:
        law: Law = fit_gain(values, 0.7, seed=seed, resamples=50)
        return law.draws

    np.testing.assert_array_equal(draws(0), draws(0))
    assert not np.array_equal(draws(0), draws(1))
