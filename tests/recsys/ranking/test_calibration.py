# SPDX-License-Identifier: Apache-2.0
import json
import math
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.calibration import _SigmoidCalibration
from sklearn.isotonic import IsotonicRegression

from recsys.core import components
from recsys.core.errors import ComponentError, ConfigError, DataError
from recsys.evaluation.metrics.auc import auc
from recsys.evaluation.metrics.calibration import expected_calibration_error
from recsys.ranking.calibration import Calibrator, Isotonic, NoCalibration, Platt, Undersampling, from_state, undersampling_correction

NAMES = ["platt", "isotonic", "none"]
N = 20_000


def build(name: str) -> Calibrator:
    cls = components.get("calibration", name)
    return components.build("calibration", cls.Config())


def planted(slope: float, intercept: float, count: int = N, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities that are wrong by a line on the logit."""
    random = np.random.default_rng(seed)
    x = random.normal(-1, 1.5, count)
    return (random.random(count) < expit(slope * x + intercept)).astype(float), expit(x)


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.5, 0.7), (2.0, -1.5)])
def test_platt_recovers_a_planted_line(slope: float, intercept: float) -> None:
    fitted = Platt(Platt.Config()).fit(*planted(slope, intercept))
    assert fitted.slope == pytest.approx(slope, rel=0.06)
    assert fitted.intercept == pytest.approx(intercept, abs=0.08)


@pytest.mark.parametrize("count", [12, 300, N])
def test_platt_is_scikit_learns_sigmoid_calibration(count: int) -> None:
    labels, probabilities = planted(0.6, 0.4, count)
    fitted = Platt(Platt.Config()).fit(labels, probabilities)
    theirs = _SigmoidCalibration().fit(logit(probabilities), labels)  # 1 / (1 + exp(a f + b))
    assert (fitted.slope, fitted.intercept) == pytest.approx((-theirs.a_, -theirs.b_), abs=1e-4)


def test_isotonic_is_scikit_learns() -> None:
    labels, probabilities = planted(0.6, 0.4, 2000)
    fitted, theirs = Isotonic(Isotonic.Config()).fit(labels, probabilities), IsotonicRegression(out_of_bounds="clip")
    theirs.fit(probabilities, labels)
    grid = np.linspace(0, 1, 5001)
    np.testing.assert_allclose(fitted.apply(grid), theirs.predict(grid), atol=1e-12)
    assert fitted.apply(probabilities).mean() == pytest.approx(labels.mean(), abs=1e-12)


@pytest.mark.parametrize("name", ["platt", "isotonic"])
def test_the_calibration_error_falls_on_events_that_the_fit_has_not_seen(name: str) -> None:
    fitted = build(name).fit(*planted(0.5, 0.7))
    labels, probabilities = planted(0.5, 0.7, seed=1)
    calibrated = fitted.apply(probabilities)
    assert expected_calibration_error(labels, calibrated) < 0.25 * expected_calibration_error(labels, probabilities)
    # Isotonic regression makes ties, which cost a little of the order.
    assert auc(labels, calibrated) == pytest.approx(auc(labels, probabilities), abs={"platt": 1e-12, "isotonic": 5e-3}[name])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_calibrated_already_stays_about_as_it_is(name: str) -> None:
    fitted, grid = build(name).fit(*planted(1.0, 0.0)), np.linspace(0.05, 0.8, 50)
    np.testing.assert_allclose(fitted.apply(grid), grid, atol=0.06)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("slope", [1.5, 0.0, -1.0])
def test_no_calibration_changes_an_order_however_bad_the_ranker(name: str, slope: float) -> None:
    fitted = build(name).fit(*planted(slope, 0.3, 2000))
    grid = np.concatenate([[0.0, 1e-30, 1e-12, 1e-7], np.linspace(0.001, 0.999, 999), [1 - 1e-7, 1.0]])
    out = fitted.apply(grid)
    assert (np.diff(out) >= 0).all() and out.min() >= 0 and out.max() <= 1
    assert out.shape == grid.shape and out.dtype == np.float64
    assert fitted.apply(grid.reshape(-1, 3)).shape == (len(grid) // 3, 3)


def test_a_ranker_that_is_worse_than_chance_gets_the_base_rate() -> None:
    labels, probabilities = planted(-1.0, 0.0, 5000)
    fitted = Platt(Platt.Config()).fit(labels, probabilities)
    assert fitted.slope == 0
    np.testing.assert_allclose(fitted.apply(probabilities), labels.mean(), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_ties_stay_ties(name: str) -> None:
    labels, probabilities = np.array([0, 1, 1, 0, 1, 0.0]), np.array([0.2, 0.2, 0.2, 0.6, 0.6, 0.1])
    out = build(name).fit(labels, probabilities).apply(probabilities)
    assert out[0] == out[1] == out[2] and out[3] == out[4]
    if name == "isotonic":  # 2 of 3 and 1 of 2 are in the wrong order: pooled, they are 3 of 5
        np.testing.assert_allclose(out, [0.6, 0.6, 0.6, 0.6, 0.6, 0.0])


@pytest.mark.parametrize("name", ["platt", "isotonic"])
def test_weight_3_is_the_event_three_times_and_weight_0_is_its_absence(name: str) -> None:
    labels, probabilities = planted(0.5, 0.2, 200)
    weights = np.random.default_rng(2).integers(0, 4, 200)
    weighted = build(name).fit(labels, probabilities, weights)
    repeated = build(name).fit(np.repeat(labels, weights), np.repeat(probabilities, weights))
    grid = np.linspace(0, 1, 101)
    np.testing.assert_allclose(weighted.apply(grid), repeated.apply(grid), atol=1e-5)


@pytest.mark.parametrize("name", ["platt", "isotonic"])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("probabilities", [[0.1, 0.2, 0.8, 0.9], [0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 1.0, 1.0]])
def test_degenerate_events_give_finite_maps(name: str, labels: list[int], probabilities: list[float]) -> None:
    fitted = build(name).fit(labels, probabilities)
    assert np.isfinite(fitted.apply([0.0, 0.2, 1.0])).all()
    if name == "platt":
        assert 0 < fitted.apply([0.5])[0] < 1
        json.dumps(fitted.state(), allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_calibrator_goes_through_json_to_the_bit(name: str) -> None:
    fitted, grid = build(name).fit(*planted(0.7, 0.1, 500)), np.random.default_rng(3).random(1000).astype(np.float32)
    state = json.loads(json.dumps(fitted.state(), allow_nan=False))
    loaded = from_state(state)
    assert type(loaded) is type(fitted) and loaded.config == fitted.config and loaded.state() == state
    assert np.array_equal(loaded.apply(grid), fitted.apply(grid))


@pytest.mark.parametrize("name", NAMES)
def test_an_unfitted_calibrator_leaves_probabilities_as_they_are(name: str) -> None:
    grid = np.linspace(0, 1, 101)
    np.testing.assert_allclose(build(name).apply(grid), grid, atol=1e-11)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 1.0])
def test_the_correction_inverts_sampling_exactly(rate: float) -> None:
    true = np.linspace(0, 1, 101)
    sampled = true / (true + rate * (1 - true))  # what holds where only this share of the negatives was kept
    np.testing.assert_allclose(undersampling_correction(sampled, rate), true, rtol=1e-12, atol=1e-15)
    inside = (true > 0) & (true < 1)
    shift = logit(undersampling_correction(true[inside], rate)) - logit(true[inside])
    np.testing.assert_allclose(shift, math.log(rate), atol=1e-9)


def test_the_undersampling_calibrator_is_the_correction_and_learns_nothing() -> None:
    labels, probabilities = planted(0.6, 0.4, 500)
    calibrator = Undersampling(Undersampling.Config(rate=0.2)).fit(labels, probabilities)
    expected = undersampling_correction(probabilities, 0.2)
    assert np.array_equal(calibrator.apply(probabilities), expected)
    assert np.array_equal(from_state(json.loads(json.dumps(calibrator.state()))).apply(probabilities), expected)


def test_the_correction_of_counted_events_is_their_rate() -> None:
    positives, negatives, rate = 30, 970, 0.1
    sampled = positives / (positives + rate * negatives)
    assert undersampling_correction(sampled, rate) == pytest.approx(positives / (positives + negatives))


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_a_rate_that_is_no_share_is_an_error(rate: float) -> None:
    with pytest.raises(ValueError, match="rate: expected a share above 0"):
        undersampling_correction([0.5], rate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 2], [0.1, 0.2]), "labels: event 1: expected 0 or 1, got 2"),
        (([0, math.nan], [0.1, 0.2]), "labels: event 1: expected 0 or 1, got nan"),
        (([0, 1], [0.1, 1.2]), "probabilities: event 1: expected 0 to 1, got 1.2"),
        (([0, 1], [math.nan, 0.2]), "probabilities: event 0"),
        (([0, 1], [0.1, 0.2], [1, -1]), "weights: event 1"),
        (([0, 1], [0.1, 0.2], [0, 0]), "at least one event"),
        (([], []), "at least one event"),
        (([0, 1], [0.1]), r"got \(2,\), \(1,\)"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_events_that_cannot_be_fitted_are_named(name: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DataError, match=f"calibration: .*{message}"):
        build(name).fit(*arguments)


def test_a_state_of_another_form_is_named() -> None:
    state = NoCalibration(NoCalibration.Config()).state()
    with pytest.raises(ComponentError, match="unknown calibration 'plat'; did you mean 'platt'"):
        from_state(state | {"config": {"name": "plat"}})
    with pytest.raises(ConfigError, match="calibration: more: unknown key"):
        from_state(state | {"config": {"name": "none", "more": 1}})
