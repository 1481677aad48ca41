# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score
from torchmetrics.classification import BinaryCalibrationError
from torchrec.metrics.calibration import compute_calibration, get_calibration_states
from torchrec.metrics.gauc import get_auc_states
from torchrec.metrics.ne import compute_ne, get_ne_states

from recsys.evaluation.metrics.auc import WeightedAUC, auc
from recsys.evaluation.metrics.calibration import calibration_ratio, expected_calibration_error, reliability_curve
from recsys.evaluation.metrics.gauc import gauc, group_auc
from recsys.evaluation.metrics.log_loss import cross_entropy, log_loss
from recsys.evaluation.metrics.normalized_entropy import normalized_entropy


def sample(seed: int = 0, n: int = 500, levels: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities (of few levels, so with ties, where asked for) and weights."""
    rng = np.random.default_rng(seed)
    p = rng.random(n) if levels is None else (rng.integers(1, levels, n) / levels)
    return (rng.random(n) < p).astype(float), p, rng.random(n)


def brute_auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> float:
    won = pairs = 0.0
    for i in np.flatnonzero(labels == 1):
        for j in np.flatnonzero(labels == 0):
            pair = weights[i] * weights[j]
            pairs += pair
            won += pair * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
    return won / pairs if pairs else math.nan


@pytest.mark.parametrize("levels", [None, 7, 2])
def test_auc_is_that_of_sklearn(levels: int | None) -> None:
    labels, p, weights = sample(levels=levels)
    assert auc(labels, p) == pytest.approx(roc_auc_score(labels, p), abs=1e-12)
    assert auc(labels, p, weights) == pytest.approx(roc_auc_score(labels, p, sample_weight=weights), abs=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.integers(-2, 2), st.integers(0, 3)), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_auc_is_the_share_of_pairs_won(rows: list[tuple[bool, int, int]]) -> None:
    labels, scores, weights = (np.array(column, float) for column in zip(*rows, strict=True))
    assert auc(labels, scores, weights) == pytest.approx(brute_auc(labels, scores, weights), nan_ok=True, abs=1e-12)


def test_auc_weights_are_repetitions() -> None:
    labels, p, _ = sample(n=60, levels=9)
    times = np.random.default_rng(1).integers(0, 4, 60)
    assert auc(labels, p, times) == pytest.approx(auc(np.repeat(labels, times), np.repeat(p, times)), abs=1e-12)


def test_auc_special_cases() -> None:
    assert auc([0, 1], [3.0, 3.0]) == 0.5
    assert auc([0, 0, 1], [-np.inf, 0.0, np.inf]) == 1.0
    assert math.isnan(auc([1, 1], [0.1, 0.2]))
    assert math.isnan(auc([], []))
    assert math.isnan(auc([0, 1], [0.1, 0.2], [1, 0]))
    with pytest.raises(ValueError, match="scores: expected numbers, got 1 NaN among 2"):
        auc([0, 1], [0.1, np.nan])
    with pytest.raises(ValueError, match=r"labels: expected 0 or 1, got 0\.5"):
        auc([0, 0.5], [0.1, 0.2])
    with pytest.raises(ValueError, match="scores: expected 2 values, got 3"):
        auc([0, 1], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="weights: expected finite values of at least 0"):
        auc([0, 1], [0.1, 0.2], [1, -1])


def test_weighted_auc_takes_many_weights_at_once() -> None:
    labels, p, _ = sample(n=80, levels=11)
    weights = np.random.default_rng(2).random((3, 5, 80))
    many = WeightedAUC(labels, p)(weights)
    assert many.shape == (3, 5)
    for place in np.ndindex(3, 5):
        assert many[place] == pytest.approx(auc(labels, p, weights[place]), abs=1e-14)
    with pytest.raises(ValueError, match=r"weights: expected 80 values in the last axis, got the shape \(2, 79\)"):
        WeightedAUC(labels, p)(np.ones((2, 79)))


@pytest.mark.parametrize("levels", [None, 5])
def test_gauc_is_the_mean_of_auc_within_groups(levels: int | None) -> None:
    labels, p, _ = sample(levels=levels)
    users = np.random.default_rng(3).choice([f"u{i}" for i in range(120)], len(labels))
    values, sizes, dropped = [], [], []
    for user in np.unique(users):
        mine = users == user
        if len(set(labels[mine])) == 2:
            values.append(roc_auc_score(labels[mine], p[mine]))
            sizes.append(int(mine.sum()))
        else:
            dropped.append(int(mine.sum()))
    assert dropped, "the sample must have groups with one class"
    by_size, uniform = gauc(labels, p, users), gauc(labels, p, users, weighting="uniform")
    assert by_size.value == pytest.approx(np.average(values, weights=sizes), abs=1e-12)
    assert uniform.value == pytest.approx(np.mean(values), abs=1e-12)
    assert (by_size.groups, by_size.dropped, by_size.dropped_impressions) == (len(values), len(dropped), sum(dropped))


def test_gauc_of_one_group_is_auc_and_shifts_of_a_group_do_not_matter() -> None:
    labels, p, _ = sample(n=200)
    assert gauc(labels, p, np.zeros(200, int)).value == pytest.approx(auc(labels, p), abs=1e-12)
    groups = np.arange(200) % 7
    assert gauc(labels, p + 10 * groups, groups).value == pytest.approx(gauc(labels, p, groups).value, abs=1e-12)


def test_gauc_special_cases() -> None:
    nothing = gauc([], [], [])
    assert math.isnan(nothing.value) and (nothing.groups, nothing.dropped) == (0, 0)
    one_class = gauc([1, 1, 0], [0.3, 0.2, 0.1], [7, 7, 8])
    assert math.isnan(one_class.value) and (one_class.groups, one_class.dropped, one_class.dropped_impressions) == (0, 2, 3)
    with pytest.raises(ValueError, match="weighting: expected 'impressions' or 'uniform', got 'clicks'"):
        gauc([0, 1], [0, 1], [0, 0], weighting="clicks")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"groups: expected the shape \(2,\), got \(1,\)"):
        gauc([0, 1], [0, 1], [0])
    names, values, sizes = group_auc([0, 1, 1], [0.1, 0.2, 0.3], ["b", "b", "a"])
    assert names.tolist() == ["a", "b"] and sizes.tolist() == [1, 2]
    assert math.isnan(values[0]) and values[1] == 1.0


def torchrec_gauc(labels: np.ndarray, p: np.ndarray, sizes: list[int]) -> tuple[float, int]:
    as_tensor = [torch.from_numpy(x)[None].float() for x in (labels, p, np.ones(len(labels)))]
    states = get_auc_states(*as_tensor, torch.tensor(sizes))
    return float(states["auc_sum"][0] / states["num_samples"][0]), int(states["num_samples"][0])


def test_uniform_gauc_is_that_of_torchrec_without_ties() -> None:
    labels, p, _ = sample(n=300)
    sizes = [30] * 10
    theirs, count = torchrec_gauc(labels, p, sizes)
    ours = gauc(labels, p, np.repeat(np.arange(10), sizes), weighting="uniform")
    assert ours.value == pytest.approx(theirs, abs=1e-6) and ours.groups == count


def test_torchrec_gauc_drops_a_group_of_equal_scores_which_is_worth_one_half_here() -> None:
    labels, p, groups = np.array([0.0, 1, 0, 1]), np.array([0.2, 0.7, 0.5, 0.5]), np.array([0, 0, 1, 1])
    assert torchrec_gauc(labels, p, [2, 2]) == (pytest.approx(1.0, abs=1e-6), 1)
    ours = gauc(labels, p, groups, weighting="uniform")
    assert (ours.value, ours.groups) == (0.75, 2)


def test_log_loss_is_that_of_sklearn() -> None:
    labels, p, weights = sample()
    assert log_loss(labels, p) == pytest.approx(sklearn_log_loss(labels, p), rel=1e-12)
    assert log_loss(labels, p, weights) == pytest.approx(sklearn_log_loss(labels, p, sample_weight=weights), rel=1e-12)
    assert log_loss([0, 1], [1.0, 0.0]) == pytest.approx(sklearn_log_loss([0, 1], [1.0, 0.0]), rel=1e-6)
    assert cross_entropy(labels, p).mean() == pytest.approx(log_loss(labels, p), rel=1e-12)


def test_log_loss_special_cases() -> None:
    assert log_loss([1, 0], [0.5, 0.5]) == pytest.approx(math.log(2))
    assert log_loss([0.25], [0.25]) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert math.isnan(log_loss([], []))
    assert math.isnan(log_loss([1], [0.5], [0.0]))
    with pytest.raises(ValueError, match=r"probabilities: expected values from 0 to 1, got 1\.2"):
        log_loss([0, 1], [0.1, 1.2])


def test_normalized_entropy_is_that_of_torchrec() -> None:
    labels, p, weights = sample()
    states = get_ne_states(*(torch.from_numpy(x)[None] for x in (labels, p.copy(), weights)), eta=1e-12)
    theirs = compute_ne(states["cross_entropy_sum"], states["weighted_num_samples"], states["pos_labels"], states["neg_labels"], eta=1e-12)
    assert normalized_entropy(labels, p, weights=weights) == pytest.approx(float(theirs[0]), rel=1e-9)


def test_normalized_entropy_of_the_base_rate_is_one() -> None:
    labels, p, _ = sample()
    assert normalized_entropy(labels, np.full(len(labels), labels.mean())) == pytest.approx(1.0)
    assert normalized_entropy(labels, np.full(len(labels), 0.3), base_rate=0.3) == pytest.approx(1.0)
    assert normalized_entropy(labels, p, base_rate=0.2) == pytest.approx(log_loss(labels, p) / log_loss(labels, np.full(len(labels), 0.2)))


def test_normalized_entropy_special_cases() -> None:
    assert math.isnan(normalized_entropy([1, 1], [0.4, 0.5]))
    assert math.isnan(normalized_entropy([], []))
    assert normalized_entropy([1, 1], [0.5, 0.5], base_rate=0.5) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="base_rate: expected a value between 0 and 1, got 1"):
        normalized_entropy([0, 1], [0.4, 0.5], base_rate=1.0)


def test_calibration_ratio_is_that_of_torchrec_save_for_no_positive() -> None:
    labels, p, weights = sample()
    states = get_calibration_states(*(torch.from_numpy(x)[None] for x in (labels, p, weights)))
    theirs = compute_calibration(states["calibration_num"], states["calibration_denom"])
    assert calibration_ratio(labels, p, weights) == pytest.approx(float(theirs[0]), rel=1e-12)
    assert calibration_ratio([1, 0, 0, 1], [0.5, 0.5, 0.5, 0.5]) == 1.0
    assert float(compute_calibration(torch.tensor([1.0]), torch.tensor([0.0]))[0]) == 0.0
    assert math.isnan(calibration_ratio([0, 0], [0.1, 0.2]))


def test_expected_calibration_error_is_that_of_torchmetrics() -> None:
    labels, p, _ = sample()
    metric = BinaryCalibrationError(n_bins=15, norm="l1")
    metric.update(torch.from_numpy(p), torch.from_numpy(labels).long())
    assert expected_calibration_error(labels, p) == pytest.approx(float(metric.compute()), abs=1e-6)


def test_expected_calibration_error_special_cases() -> None:
    assert expected_calibration_error([0, 1, 1, 1], [0.75] * 4) == 0.0
    assert expected_calibration_error([0, 0], [1.0, 1.0]) == 1.0
    assert math.isnan(expected_calibration_error([], []))


@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_reliability_curve_is_that_of_sklearn(strategy: str) -> None:
    labels, p, _ = sample()
    observed, predicted = calibration_curve(labels, p, n_bins=10, strategy=strategy)
    curve = reliability_curve(labels, p, 10, strategy)  # type: ignore[arg-type]
    np.testing.assert_allclose(curve.predicted, predicted, rtol=1e-12)
    np.testing.assert_allclose(curve.observed, observed, rtol=1e-12)
    assert curve.count.sum() == len(labels)


def test_reliability_curve_keeps_equal_probabilities_together() -> None:
    curve = reliability_curve([0, 1, 1, 0, 1], [0.2, 0.2, 0.2, 0.2, 0.9], bins=5)
    assert curve.predicted.tolist() == pytest.approx([0.2, 0.9])
    assert curve.observed.tolist() == [0.5, 1.0]
    assert curve.count.tolist() == [4, 1]
    assert len(reliability_curve([], []).count) == 0
    with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
        reliability_curve([0], [0.5], bins=0)
