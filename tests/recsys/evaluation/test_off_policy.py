# SPDX-License-Identifier: Apache-2.0
"""EV-6: what a policy would have earned, where the truth is known because the world is simulated."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from recsys.evaluation.off_policy import OffPolicy, doubly_robust, inverse_propensity, self_normalised

CONTEXTS, ACTIONS = 6, 8
FAST = {"resamples": 2}


class World:
    """Rewards by context and action, a policy that served, and one that is asked about; a reward model that is wrong unless it is said."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.mean = self.random.random((CONTEXTS, ACTIONS)) ** 2
        noise = self.random.standard_normal((CONTEXTS, ACTIONS))
        self.logging = 0.5 * _policy(noise) + 0.5 / ACTIONS  # which gives every action a chance
        self.target = _policy(4 * self.mean)
        self.value = float((self.target * self.mean).sum(1).mean())
        self.wrong = self.random.random((CONTEXTS, ACTIONS))

    def log(self, count: int) -> dict[str, np.ndarray]:
        context = self.random.integers(CONTEXTS, size=count)
        drawn = self.random.random((count, 1)) < np.cumsum(self.logging[context], axis=1)
        action = drawn.argmax(1)
        return {
            "reward": (self.random.random(count) < self.mean[context, action]).astype(float),
            "propensity": self.logging[context, action],
            "target": self.target[context, action],
            "clusters": np.arange(count),
            "context": context,
            "action": action,
        }

    def robust(self, logged: dict[str, np.ndarray], model: np.ndarray, **options: Any) -> OffPolicy:
        expected = (self.target * model).sum(1)[logged["context"]]
        given = {name: logged[name] for name in ("reward", "propensity", "target", "clusters")}
        return doubly_robust(**given, predicted=model[logged["context"], logged["action"]], expected=expected, **options)


def _policy(preference: np.ndarray) -> np.ndarray:
    odds = np.exp(preference)
    return np.asarray(odds / odds.sum(1, keepdims=True))


def given(logged: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: logged[name] for name in ("reward", "propensity", "target", "clusters")}


def spread(estimate: Callable[[], float], repeats: int = 300) -> tuple[float, float, float]:
    """Mean of an estimate, its standard error, and the standard deviation of one."""
    values = np.array([estimate() for _ in range(repeats)])
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(repeats)), float(values.std(ddof=1))


def test_all_are_unbiased_and_a_right_model_lowers_the_variance() -> None:
    world = World(0)
    means = {
        "ips": spread(lambda: inverse_propensity(**given(world.log(400)), **FAST).interval.estimate),
        "snips": spread(lambda: self_normalised(**given(world.log(400)), **FAST).interval.estimate),
        "wrong model": spread(lambda: world.robust(world.log(400), world.wrong, **FAST).interval.estimate),
        "right model": spread(lambda: world.robust(world.log(400), world.mean, **FAST).interval.estimate),
    }
    for name, (mean, error, _) in means.items():
        slack = 0.01 if name == "snips" else 0.0  # whose bias falls with 1 / N
        assert abs(mean - world.value) < 4 * error + slack, name
    naive = float(np.mean(world.log(100_000)["reward"]))
    assert abs(naive - world.value) > 0.05, "the policies must differ for this to show anything"
    assert means["right model"][2] < means["ips"][2] and means["snips"][2] < means["ips"][2]


def test_a_right_model_makes_up_for_wrong_propensities() -> None:
    world = World(1)
    logged = world.log(200_000)
    logged["propensity"] = np.clip(logged["propensity"] * 0.5, 0, 1)
    assert world.robust(logged, world.mean, **FAST).interval.estimate == pytest.approx(world.value, abs=0.01)
    assert abs(inverse_propensity(**given(logged), **FAST).interval.estimate - world.value) > 0.1


def test_the_policy_that_served_earns_what_it_earned() -> None:
    logged = World(2).log(500) | {}
    logged["target"] = logged["propensity"]
    for estimate in (inverse_propensity, self_normalised):
        found = estimate(**given(logged), **FAST)
        assert found.interval.estimate == pytest.approx(logged["reward"].mean()) and found.effective_size == pytest.approx(500)
        assert (found.clipped, found.largest_weight, found.count) == (0.0, 1.0, 500)


def test_clipping_bounds_the_weights_and_is_told() -> None:
    world = World(3)
    logged = world.log(5000)
    raw, cut = inverse_propensity(**given(logged), **FAST), inverse_propensity(**given(logged), clip=2.0, **FAST)
    weights = logged["target"] / logged["propensity"]
    assert raw.largest_weight == cut.largest_weight == weights.max() > 2
    assert raw.clipped == 0 and cut.clipped == pytest.approx((weights > 2).mean())
    assert cut.interval.estimate <= raw.interval.estimate and cut.effective_size > raw.effective_size
    assert raw.effective_size == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert cut.interval.estimate == pytest.approx(np.mean(np.minimum(weights, 2) * logged["reward"]))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    world = World(4)
    held = 0
    for seed in range(60):
        interval = inverse_propensity(**given(world.log(600)), resamples=300, level=0.9, seed=seed).interval
        held += interval.low <= world.value <= interval.high
    assert 44 <= held <= 60


def test_impressions_of_one_request_are_drawn_together() -> None:
    """Each impression told twice says nothing new, so the interval stays; taken as events of their own it would shrink."""
    logged = given(World(5).log(400))
    twice = {name: np.concatenate([values, values]) for name, values in logged.items()}
    widths = []
    for clusters in (twice["clusters"], np.arange(800)):
        interval = inverse_propensity(**(twice | {"clusters": clusters}), resamples=2000).interval
        widths.append(interval.high - interval.low)
    once = inverse_propensity(**logged, resamples=2000).interval
    assert widths[0] == pytest.approx(once.high - once.low, rel=1e-9) and widths[1] < 0.85 * widths[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"propensity": [0.0, 0.5]}, "propensity: expected values above 0"),
        ({"propensity": [1.5, 0.5]}, "propensity: expected values from 0 to 1"),
        ({"target": [0.5]}, "target: expected 2 values, got 1"),
        ({"reward": [0.5, np.nan]}, "reward: expected numbers"),
        ({"clip": 0.0}, r"clip: expected a weight above 0, got 0\.0"),
        ({"clusters": [1]}, "clusters: expected one for each of the 2 events"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    whole = {"reward": [1.0, 0.0], "propensity": [0.5, 0.5], "target": [0.5, 0.5], "clusters": [1, 2]}
    with pytest.raises(ValueError, match=message):
        inverse_propensity(**(whole | changes))


def test_a_target_that_shows_nothing_that_was_logged() -> None:
    with pytest.raises(ValueError, match="target: expected a probability above 0"):
        self_normalised([1.0, 0.0], [0.5, 0.5], [0.0, 0.0], [1, 2])
