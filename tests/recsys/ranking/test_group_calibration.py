# SPDX-License-Identifier: Apache-2.0
"""A calibration for each domain: what the one over all gets wrong in each of them, it gets right."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit

from recsys.core import components
from recsys.core.config import parse
from recsys.core.errors import ConfigError, DataError
from recsys.evaluation.metrics.calibration import calibration_ratio, expected_calibration_error
from recsys.ranking.calibration import Platt, from_state
from recsys.ranking.group_calibration import PerGroup

LINES = {"books": (0.5, 0.8), "films": (1.0, 0.0), "toys": (1.5, -1.0)}
N = 20_000


def build(base: str = "platt", **more: Any) -> PerGroup:
    config = parse(PerGroup.Config, {"column": "domain", "base": {"name": base}, **more}, source="test")
    return components.build("calibration", config)


def planted(seed: int = 0, count: int = N, lines: dict[str, tuple[float, float]] = LINES) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities that are wrong by another line on the logit in each domain, and the domains."""
    random = np.random.default_rng(seed)
    domain = random.choice(list(lines), count)
    x = random.normal(-0.5, 1.5, count)
    slope, intercept = np.array([lines[name] for name in domain]).T
    return (random.random(count) < expit(slope * x + intercept)).astype(float), expit(x), domain.astype(object)


@pytest.mark.parametrize("base", ["platt", "isotonic"])
def test_the_error_falls_in_every_domain_on_events_that_the_fit_has_not_seen(base: str) -> None:
    labels, probabilities, domains = planted()
    grouped = build(base).fit(labels, probabilities, None, domains)
    whole = components.build("calibration", grouped.config.base).fit(labels, probabilities)
    labels, probabilities, domains = planted(seed=1)
    ours, theirs = grouped.apply(probabilities, domains), whole.apply(probabilities)
    for name in LINES:
        mine = domains == name
        error = expected_calibration_error(labels[mine], ours[mine])
        assert error < 0.025
        assert calibration_ratio(labels[mine], ours[mine]) == pytest.approx(1, abs=0.03)
        if name != "films":
            assert error < 0.5 * expected_calibration_error(labels[mine], theirs[mine])
            assert error < 0.5 * expected_calibration_error(labels[mine], probabilities[mine])


@pytest.mark.parametrize("base", ["platt", "isotonic", "none"])
def test_it_keeps_the_order_within_a_domain(base: str) -> None:
    fitted, grid = build(base).fit(*planted(count=6000)[:2], None, planted(count=6000)[2]), np.linspace(0, 1, 501)
    for name in (*LINES, "unheard of", None):
        out = fitted.apply(grid, [name] * len(grid))
        assert (np.diff(out) >= 0).all() and out.min() >= 0 and out.max() <= 1 and out.dtype == np.float64


@pytest.mark.parametrize("base", ["platt", "isotonic", "none"])
def test_what_is_calibrated_already_stays_about_as_it_is(base: str) -> None:
    labels, probabilities, domains = planted(lines=dict.fromkeys(LINES, (1.0, 0.0)))
    fitted, grid = build(base).fit(labels, probabilities, None, domains), np.linspace(0.1, 0.8, 50)
    for name in LINES:
        np.testing.assert_allclose(fitted.apply(grid, [name] * 50), grid, atol=0.07)


def test_each_domain_has_the_fit_of_its_own_events() -> None:
    labels, probabilities, domains = planted(count=5000)
    weights = np.random.default_rng(3).integers(0, 4, 5000)
    fitted = build().fit(labels, probabilities, weights, domains)
    grid = np.linspace(0, 1, 101)
    for name in LINES:
        mine = domains == name
        alone = Platt(Platt.Config()).fit(labels[mine], probabilities[mine], weights[mine])
        np.testing.assert_allclose(fitted.apply(grid, [name] * 101), alone.apply(grid), atol=1e-6)


def test_small_one_sided_unknown_and_null_domains_are_calibrated_as_all_events_are() -> None:
    labels, probabilities, domains = planted(count=6000)
    domains[:40] = "small"
    domains[40:1000], labels[40:1000] = "loved", 1
    domains[1000:2500] = None
    fitted = build(min_events=200).fit(labels, probabilities, None, domains)
    assert set(fitted.groups) == set(LINES)
    grid = np.linspace(0, 1, 101)
    whole = Platt(Platt.Config()).fit(labels, probabilities).apply(grid)
    for name in ("small", "loved", "unknown", None):
        assert np.array_equal(fitted.apply(grid, [name] * 101), whole)


def test_domains_come_as_arrow_and_in_any_order() -> None:
    labels, probabilities, domains = planted(count=5000)
    fitted = build().fit(labels, probabilities, None, pa.chunked_array([domains[:10].tolist(), domains[10:].tolist()]))
    out = fitted.apply(probabilities, pa.array(domains.tolist()))
    order = np.random.default_rng(0).permutation(5000)
    assert np.array_equal(fitted.apply(probabilities[order], domains[order]), out[order])
    given = probabilities.copy()
    build("none").apply(given, domains)
    assert np.array_equal(given, probabilities), "what is given stays as it is"


@pytest.mark.parametrize("base", ["platt", "isotonic", "none"])
def test_it_goes_through_json_to_the_bit(base: str) -> None:
    fitted, (_, probabilities, domains) = build(base).fit(*planted(count=5000)[:2], None, planted(count=5000)[2]), planted(7, 2000)
    state = json.loads(json.dumps(fitted.state(), allow_nan=False))
    loaded = from_state(state)
    assert isinstance(loaded, PerGroup) and loaded.config == fitted.config and loaded.state() == state and loaded.column == "domain"
    assert np.array_equal(loaded.apply(probabilities, domains), fitted.apply(probabilities, domains))


def test_a_known_sampling_rate_may_stand_in_each_domain() -> None:
    config = parse(PerGroup.Config, {"column": "d", "base": {"name": "undersampling", "rate": 0.2}}, source="test")
    grid = np.linspace(0, 1, 11)
    out = components.build("calibration", config).apply(grid, ["x"] * 11)
    np.testing.assert_allclose(out, grid / (grid + (1 - grid) / 0.2))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (None, "expected the values of 'domain' beside the probabilities, got none"),
        (["a"], r"domain: expected one value for each probability \(2,\), got \(1,\)"),
        (["a", 3], "domain: expected strings, got 3"),
    ],
)
def test_malformed_domains_are_named(groups: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build().apply([0.1, 0.2], groups)
    with pytest.raises(DataError, match=message):
        build().fit([0, 1], [0.1, 0.2], None, groups)


def test_domains_do_not_nest() -> None:
    inner = {"name": "per_group", "column": "b", "base": {"name": "platt"}}
    with pytest.raises(ConfigError, match="base: expected a calibration of one group, got per_group"):
        parse(PerGroup.Config, {"column": "a", "base": inner}, source="test")
