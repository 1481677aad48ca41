# SPDX-License-Identifier: Apache-2.0
"""The split of users, and what a policy makes of figures."""

import math
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.registry import Event
from serving.lanes.figures import Figures, psi
from serving.lanes.policy import CanaryPolicy
from serving.lanes.split import SALT, is_in, place_of


def event(identity: int, percent: float, **details: Any) -> Event:
    return Event(
        id=identity,
        time=datetime(2030, 1, 1, tzinfo=UTC),
        model="m",
        action="canary",
        actor="a",
        reason="r",
        from_version=1,
        to_version=2,
        sha256="s",
        gates=[],
        details={"percent": percent, **details},
    )


def figures(count: int, *, errors: int = 0, seconds: float = 0.01, shift: float = 0.0) -> Figures:
    made, drawn = Figures(), np.random.default_rng(0).beta(2, 5, count)
    for place, probability in enumerate(drawn):
        made.answered(seconds, error=place < errors, probability=min(probability + shift, 1.0))
    return made


@pytest.mark.parametrize("percent", [1.0, 5.0, 25.0, 50.0])
def test_the_split_is_within_its_binomial_interval(percent: float) -> None:
    users = 50_000
    for identity in range(1, 6):
        own = sum(is_in(str(user), event(identity, percent)) for user in range(users))
        low, high = binom.interval(0.9999, users, percent / 100)
        assert low <= own <= high


def test_who_is_in_stays_in_and_another_canary_draws_anew() -> None:
    users = [str(user) for user in range(2000)]
    steps = [event(7, 1.0), event(8, 5.0, **{SALT: 7}), event(9, 25.0, **{SALT: 7})]
    chosen = [{user for user in users if is_in(user, step)} for step in steps]
    assert chosen[0] < chosen[1] < chosen[2]
    other = {user for user in users if is_in(user, event(10, 25.0))}
    assert len(other & chosen[2]) < 0.5 * len(chosen[2])
    assert 0 <= place_of("\ud800", 1) < 1


def test_a_canary_that_holds_goes_on_step_by_step() -> None:
    policy, good = CanaryPolicy(), figures(1000)
    assert policy.verdict(1.0, 29.9, good, good).move == "hold"
    assert policy.verdict(1.0, 30.0, figures(999), good).move == "hold"
    moves = [policy.verdict(percent, 30.0, good, good) for percent in (1.0, 5.0, 25.0)]
    assert [(move.move, move.percent) for move in moves] == [("advance", 5.0), ("advance", 25.0), ("promote", None)]


@pytest.mark.parametrize(
    ("canary", "problem"),
    [
        (figures(1000, errors=6), "error rate 0.60%"),
        (figures(1000, seconds=0.0126), "p99 13 ms"),
        (figures(1000, shift=0.2), "PSI"),
    ],
)
def test_each_guardrail_takes_a_canary_back(canary: Figures, problem: str) -> None:
    verdict = CanaryPolicy().verdict(1.0, 1.0, canary, figures(1000))
    assert verdict.move == "withdraw" and len(verdict.problems) == 1 and verdict.problems[0].startswith(problem)


def test_what_is_just_within_passes_and_few_answers_judge_nothing() -> None:
    policy, champion = CanaryPolicy(), figures(1000)
    assert policy.verdict(1.0, 1.0, figures(1000, errors=5, seconds=0.0124), champion).move == "hold"
    assert policy.verdict(1.0, 1.0, figures(199, errors=199, seconds=9.0, shift=0.5), champion).move == "hold"


@pytest.mark.parametrize(("positive", "move"), [(80, "withdraw"), (92, "hold"), (108, "hold"), (120, "withdraw")])
def test_the_calibration_is_judged_where_there_are_labels(positive: int, move: str) -> None:
    canary = figures(1000)
    for place in range(200):
        canary.label(0.5, float(place < positive))
    assert canary.calibration == pytest.approx(100 / positive)
    assert CanaryPolicy().verdict(1.0, 1.0, canary, figures(1000)).move == move


def test_psi_is_that_of_its_definition() -> None:
    random = np.random.default_rng(1)
    base, other = random.normal(size=5000), random.normal(0.5, 1.2, 4000)
    assert psi(base, base) == 0
    edges = [-math.inf, *np.quantile(base, np.arange(1, 10) / 10), math.inf]
    p, q = (np.histogram(values, edges)[0] + 0.5 for values in (base, other))
    p, q = p / p.sum(), q / q.sum()
    assert psi(base, other) == pytest.approx(float(np.sum((q - p) * np.log(q / p)))) and psi(base, other) > 0.2
    assert psi(np.zeros(10), np.zeros(10)) == 0 and Figures().psi_from(Figures()) is None


@pytest.mark.parametrize("steps", [(), (5, 1), (0, 5), (1, 100)])
def test_steps_that_are_none_are_refused(steps: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="steps"):
        parse(CanaryPolicy, {"steps": steps}, source="test")
