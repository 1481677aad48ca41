# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from recsys.evaluation import bootstrap
from recsys.evaluation.bootstrap import (
    Interval,
    bootstrap_mean,
    paired_auc_difference,
    paired_mean_difference,
    paired_metric_difference,
)
from recsys.evaluation.metrics.auc import WeightedAUC, auc


def clustered(rng: np.random.Generator, users: int = 80, effect: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of two models on unequally many events of each user, whose difference has a user's own part beside noise."""
    size = rng.integers(1, 9, users)
    user = np.repeat(np.arange(users), size)
    hard = rng.normal(size=users)[user] * 3
    own = rng.normal(size=users)[user] * 0.5
    theirs = hard + rng.normal(size=len(user))
    return theirs + effect + own + 0.2 * rng.normal(size=len(user)), theirs, user


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    trials, held, held_by_event = 300, 0, 0
    for trial in range(trials):
        ours, theirs, user = clustered(rng, effect=0.3)
        interval = paired_mean_difference(ours, theirs, user, resamples=300, level=0.9, seed=trial)
        held += interval.low <= 0.3 <= interval.high
        naive = paired_mean_difference(ours, theirs, np.arange(len(user)), resamples=300, level=0.9, seed=trial)
        held_by_event += naive.low <= 0.3 <= naive.high
    # 4 standard errors of a share of 0.9, and a little for the percentile method's own bias.
    assert abs(held / trials - 0.9) < 4 * np.sqrt(0.9 * 0.1 / trials)
    assert held_by_event < held - 0.05 * trials, "without clusters the intervals must be too narrow, or this simulation shows nothing"


def test_the_same_draws_done_one_by_one() -> None:
    ours, theirs, user = clustered(np.random.default_rng(1), users=12)
    rng = np.random.default_rng(7)
    differences = []
    for chosen in rng.integers(12, size=(200, 12)):
        events = np.concatenate([np.flatnonzero(user == u) for u in chosen])
        differences.append(ours[events].mean() - theirs[events].mean())
    interval = paired_mean_difference(ours, theirs, user, resamples=200, level=0.8, seed=7)
    assert interval.estimate == pytest.approx(ours.mean() - theirs.mean())
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(differences, [0.1, 0.9])), rel=1e-10)


def test_auc_differences_done_one_by_one() -> None:
    rng = np.random.default_rng(2)
    user = np.repeat(np.arange(15), 6)
    labels = rng.integers(0, 2, 90)
    ours, theirs = labels + rng.normal(size=90), np.round(labels + rng.normal(size=90) * 2)
    draws = np.random.default_rng(3).integers(15, size=(100, 15))
    differences = []
    for chosen in draws:
        events = np.concatenate([np.flatnonzero(user == u) for u in chosen])
        differences.append(auc(labels[events], ours[events]) - auc(labels[events], theirs[events]))
    interval = paired_auc_difference(labels, ours, theirs, user, resamples=100, level=0.9, seed=3)
    assert interval.estimate == pytest.approx(auc(labels, ours) - auc(labels, theirs))
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(differences, [0.05, 0.95])), rel=1e-10)


def test_pairing_removes_what_both_models_share() -> None:
    ours, theirs, user = clustered(np.random.default_rng(4))
    paired = paired_mean_difference(ours, theirs, user)
    alone = bootstrap_mean(ours, user)
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)


def test_a_model_does_not_differ_from_itself() -> None:
    ours, _, user = clustered(np.random.default_rng(5))
    same = paired_mean_difference(ours, ours, user)
    assert (same.estimate, same.low, same.high) == (0, 0, 0)
    assert not same.above() and not same.below()
    labels = (ours > 0).astype(int)
    assert paired_auc_difference(labels, ours, ours, user, resamples=50).high == 0


def test_weights_are_repetitions_of_events() -> None:
    ours, theirs, user = clustered(np.random.default_rng(6))
    times = np.random.default_rng(7).integers(0, 4, len(user))
    times[np.unique(user, return_index=True)[1]] = 2  # no user disappears, which would change the draws
    weighted = paired_mean_difference(ours, theirs, user, weights=times, seed=1)
    repeated = paired_mean_difference(np.repeat(ours, times), np.repeat(theirs, times), np.repeat(user, times), seed=1)
    assert (weighted.estimate, weighted.low, weighted.high) == pytest.approx((repeated.estimate, repeated.low, repeated.high), rel=1e-10)


def test_names_of_users_do_not_matter_and_the_seed_decides() -> None:
    ours, theirs, user = clustered(np.random.default_rng(8))
    assert paired_mean_difference(ours, theirs, user, seed=3) == paired_mean_difference(ours, theirs, np.char.mod("u%05d", user), seed=3)
    assert paired_mean_difference(ours, theirs, user, seed=3) != paired_mean_difference(ours, theirs, user, seed=4)


def test_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, user = clustered(np.random.default_rng(9), users=10)
    whole = paired_mean_difference(ours, theirs, user, resamples=300)
    monkeypatch.setattr(bootstrap, "_BUDGET", 64)
    blocks = paired_mean_difference(ours, theirs, user, resamples=300)
    assert (blocks.low, blocks.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_any_metric_that_takes_weights() -> None:
    ours, theirs, user = clustered(np.random.default_rng(10))

    def mean_of(values: np.ndarray) -> bootstrap.WeightedMetric:
        return lambda weights: weights @ values / weights.sum(axis=-1)

    by_metric = paired_metric_difference(mean_of(ours), mean_of(theirs), user, resamples=500, seed=2)
    by_mean = paired_mean_difference(ours, theirs, user, resamples=500, seed=2)
    assert (by_metric.estimate, by_metric.low, by_metric.high) == pytest.approx((by_mean.estimate, by_mean.low, by_mean.high), rel=1e-9)


def test_above_and_below() -> None:
    assert Interval(0.2, 0.1, 0.3, 0.95).above() and not Interval(0.2, 0.1, 0.3, 0.95).above(0.1)
    assert Interval(-0.2, -0.3, -0.1, 0.95).below() and not Interval(-0.2, -0.3, 0.1, 0.95).below()
    assert str(Interval(0.2, -0.1, 0.3, 0.95)) == "+0.2000 [-0.1000, +0.3000] at 95%"


def test_an_undefined_draw_is_left_out_and_too_many_are_an_error() -> None:
    labels = np.array([1] + [0] * 40)
    scores = np.arange(41.0)
    with pytest.raises(ValueError, match=r"bootstrap: the metric is undefined on 1\d\d of 400 draws"):
        paired_auc_difference(labels, scores, -scores, np.arange(41), resamples=400)
    labels[:5] = 1
    assert paired_auc_difference(labels, scores, -scores, np.arange(41), resamples=400).below()
    with pytest.raises(ValueError, match="is nan on all events"):
        paired_metric_difference(WeightedAUC([0, 0], [1, 2]), WeightedAUC([0, 0], [1, 2]), [0, 1], resamples=10)


def test_errors() -> None:
    with pytest.raises(ValueError, match="theirs: expected 2 values, got 1"):
        paired_mean_difference([1, 2], [1], [0, 1])
    with pytest.raises(ValueError, match="clusters: expected one for each of the 2 events"):
        bootstrap_mean([1, 2], [0, 1, 2])
    with pytest.raises(ValueError, match=r"clusters: expected the shape \(2,\), got \(1,\)"):
        paired_auc_difference([0, 1], [1, 2], [1, 2], [0])
    with pytest.raises(ValueError, match="at least one event"):
        bootstrap_mean([], [])
    with pytest.raises(ValueError, match="level: expected a value between 0 and 1, got 95"):
        bootstrap_mean([1.0, 2.0], [0, 1], level=95)
    with pytest.raises(ValueError, match="resamples: expected at least 1, got 0"):
        bootstrap_mean([1.0, 2.0], [0, 1], resamples=0)
    with pytest.raises(ValueError, match="values: expected numbers, got 1 NaN among 2"):
        bootstrap_mean([1.0, np.nan], [0, 1])
