# SPDX-License-Identifier: Apache-2.0
"""Gates pass and fail where they say, whatever the figures are."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from recsys.core.config import Config, parse
from recsys.core.errors import ConfigError
from recsys.evaluation.bootstrap import paired_mean_difference
from recsys.registry import AgainstChampion, Bound, Evidence, Gate, run_gates
from recsys.registry.evidence import slice_metric
from recsys.registry.gates import CalibrationBand, LatencyBudget, ParityBound, SchemaCompatibility, SliceFloors, lookup

METRICS: dict[str, Any] = {
    "ranking": {"model": {"auc": 0.75}, "ranker": {"calibration": 0.97, "ece": 0.02}},
    "list": {"final": {"ndcg@10": 0.1}},
    "flat.name": 3,
    "bad": float("nan"),
    "text": "x",
    "parity": {"max_difference": 1e-6},
    "by_slice": {
        "all": {"events": 1000, "list": {"ndcg@10": 0.1}, "ranker": {"auc": 0.75, "calibration": 0.97}},
        "new_user": {"events": 700, "list": {"ndcg@10": 0.09}, "ranker": {"auc": 0.72, "calibration": 1.2}},
        "domain=books": {"events": 300, "list": {"ndcg@10": 0.2}, "ranker": {"auc": None, "calibration": float("nan")}},
        "domain=films": {"events": 40, "list": {"ndcg@10": 0.001}, "ranker": {"auc": 0.5, "calibration": 3.0}},
    },
}
NUMBERS = st.floats(-10, 10)
NOTHING = st.sampled_from([None, float("nan"), float("inf"), -float("inf"), "0.5", [], {}])


def judge(gate: Any, metrics: dict[str, Any] = METRICS, comparison: Any = None, **more: Any) -> list[Any]:
    return run_gates((gate,), Evidence(Path("nowhere"), metrics, comparison, **more))


def verdicts(gate: Any, **more: Any) -> dict[str, bool]:
    return {result.gate: result.passed for result in judge(gate, **more)}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("ranking.model.auc", 0.75),
        ("list.final.ndcg@10", 0.1),
        ("flat.name", 3),
        ("ranking.model", None),
        ("nothing", None),
        ("text", None),
    ],
)
def test_lookup(path: str, value: float | None) -> None:
    assert lookup(METRICS, path) == value


# --- bounds


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        (Bound(metric="ranking.model.auc", at_least=0.75), True),
        (Bound(metric="ranking.model.auc", at_least=0.7501), False),
        (Bound(metric="ranking.model.auc", at_most=0.75), True),
        (Bound(metric="ranking.model.auc", at_least=0.7, at_most=0.74), False),
        (Bound(metric="absent", at_least=0), False),
        (Bound(metric="bad", at_least=0), False),
    ],
)
def test_bounds(gate: Bound, passed: bool) -> None:
    (result,) = judge(gate)
    assert result.passed is passed


# --- what holds for every gate


def of_value(value: Any) -> dict[str, Any]:
    """Metrics in which every figure that a gate of one number looks at is ``value``."""
    ranker = {"calibration": value, "ece": value, "auc": value}
    return {
        "m": value,
        "ranking": {"ranker": ranker},
        "by_slice": {"s": {"events": 1000, "ranker": ranker}},
        "parity": {"max_difference": value},
    }


@given(value=NUMBERS, floor=NUMBERS, more=st.floats(0, 10))
def test_raising_a_floor_never_makes_a_failure_pass(value: float, floor: float, more: float) -> None:
    for low, high in (
        (Bound(metric="m", at_least=floor), Bound(metric="m", at_least=floor + more)),
        (
            SliceFloors(metric="ranker.auc", slices=("s",), at_least=floor),
            SliceFloors(metric="ranker.auc", slices=("s",), at_least=floor + more),
        ),
    ):
        (first,), (second,) = judge(low, of_value(value)), judge(high, of_value(value))
        assert first.passed or not second.passed
        assert first.value == second.value == value


@given(value=st.floats(0, 10), bound=st.floats(0.001, 10), less=st.floats(0.001, 1))
def test_lowering_a_ceiling_never_makes_a_failure_pass(value: float, bound: float, less: float) -> None:
    measured = {"latency": {"p50_ms": value, "p99_ms": value}, "parity": {"max_difference": value, "rows": 3}}
    for wide, narrow in (
        (Bound(metric="m", at_most=bound), Bound(metric="m", at_most=bound * less)),
        (LatencyBudget(p50_ms=bound), LatencyBudget(p50_ms=bound * less)),
        (LatencyBudget(p99_ms=bound), LatencyBudget(p99_ms=bound * less)),
        (ParityBound(at_most=bound), ParityBound(at_most=bound * less)),
    ):
        (first,), (second,) = (judge(gate, of_value(value), measured=measured) for gate in (wide, narrow))
        assert first.passed or not second.passed


@given(low=NUMBERS, margin=NUMBERS, more=st.floats(0, 10))
def test_a_wider_margin_never_makes_a_pass_fail(low: float, margin: float, more: float) -> None:
    interval = {"estimate": low, "low": low, "high": low}
    comparison = {"m": interval, slice_metric("s", "m"): interval}
    for narrow, wide in (
        (AgainstChampion(metric="m", margin=margin), AgainstChampion(metric="m", margin=margin + more)),
        (SliceFloors(metric="m", slices=("s",), margin=margin), SliceFloors(metric="m", slices=("s",), margin=margin + more)),
    ):
        (first,), (second,) = (judge(gate, of_value(0.0), comparison) for gate in (narrow, wide))
        assert second.passed or not first.passed


@given(value=NOTHING)
def test_what_is_no_number_fails_every_gate(value: Any) -> None:
    interval = {"estimate": 0.0, "low": value, "high": 1.0}
    comparison = {"m": interval, slice_metric("s", "m"): interval}
    measured = {"latency": {"p50_ms": value, "p99_ms": value}, "parity": {"max_difference": value, "rows": 3}}
    gates = (
        Bound(metric="m", at_least=-1e9),
        Bound(metric="m"),
        AgainstChampion(metric="m", margin=1e9),
        SliceFloors(metric="ranker.auc", slices=("s",), at_least=-1e9),
        SliceFloors(metric="m", slices=("s",), margin=1e9),
        CalibrationBand(band=(-1e9, 1e9), ece=1e9),
        LatencyBudget(p50_ms=1e9, p99_ms=1e9),
        ParityBound(at_most=1e9),
    )
    for gate in gates:
        for result in judge(gate, of_value(value), comparison, measured=measured):
            assert not result.passed and result.value is None and result.note, (gate, result)


def test_what_is_not_there_fails_every_gate() -> None:
    gates = (
        Bound(metric="m", at_least=0),
        AgainstChampion(metric="m"),
        SliceFloors(metric="m", slices=("s",), at_least=0, margin=0),
        CalibrationBand(ece=0.1),
        LatencyBudget(p99_ms=1),
        ParityBound(at_most=1),
        SchemaCompatibility(),
    )
    for gate in gates:
        results = judge(gate, {}, {})
        assert results and not any(result.passed for result in results), gate
        assert all(result.note for result in results), gate


def test_without_a_champion_nothing_is_compared() -> None:
    gates = (Bound(metric="flat.name", at_least=1), AgainstChampion(metric="ndcg"), SchemaCompatibility())
    results = run_gates((*gates, SliceFloors(metric="list.ndcg@10", slices=("all",), margin=0.1)), Evidence(Path(), METRICS))
    assert [result.gate for result in results] == ["flat.name"]


# --- against the champion


@pytest.mark.parametrize(("margin", "passed"), [(0.0, False), (0.02, True)])
def test_the_lower_end_of_the_interval_decides(margin: float, passed: bool) -> None:
    comparison = {"ndcg": {"estimate": 0.01, "low": -0.02, "high": 0.04}}
    (result,) = judge(AgainstChampion(metric="ndcg", margin=margin), comparison=comparison)
    assert result.passed is passed
    assert result.value == -0.02


def test_what_was_not_compared_fails() -> None:
    (result,) = judge(AgainstChampion(metric="auc"), comparison={})
    assert not result.passed
    assert "not compared" in result.note


def simulated(true: float, random: np.random.Generator) -> dict[str, float]:
    """The interval of a candidate that is better by ``true`` on average, on events of 150 users that differ among themselves."""
    users = np.repeat(np.arange(150), random.integers(1, 9, 150))
    difference = true + random.normal(0, 0.012, 150)[users] + random.normal(0, 0.03, len(users))
    interval = paired_mean_difference(difference, np.zeros_like(difference), users, resamples=300, seed=int(random.integers(1 << 30)))
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}


def test_an_equal_candidate_passes_and_a_worse_one_fails_as_often_as_the_interval_says() -> None:
    random, gate, runs = np.random.default_rng(0), AgainstChampion(metric="m", margin=0.005), 300

    def passing(true: float) -> tuple[float, float]:
        found = [simulated(true, random) for _ in range(runs)]
        share = float(np.mean([judge(gate, comparison={"m": interval})[0].passed for interval in found]))
        return share, float(np.std([interval["estimate"] for interval in found]))

    equal, error = passing(0.0)
    # A 95% interval reaches 1.96 standard errors down, so an estimate of more than that above the margin passes.
    assert equal == pytest.approx(norm.cdf(0.005 / error - 1.96), abs=0.07) and equal > 0.8
    at_the_margin, _ = passing(-0.005)
    assert at_the_margin < 0.025 + 3 * math.sqrt(0.025 * 0.975 / runs)
    worse, _ = passing(-0.015)
    assert worse == 0


# --- slices


def test_every_slice_has_its_own_floor_and_a_small_one_is_told_and_not_judged() -> None:
    gate = SliceFloors(metric="list.ndcg@10", slices=("new_user", "domain=*"), at_least=0.15, min_events=100)
    results = {result.gate: result for result in judge(gate)}
    assert {name: result.passed for name, result in results.items()} == {
        "list.ndcg@10[new_user]": False,
        "list.ndcg@10[domain=books]": True,
        "list.ndcg@10[domain=films]": True,
    }
    small = results["list.ndcg@10[domain=films]"]
    assert small.note == "not judged: 40 events, fewer than 100" and small.value == 0.001
    assert not verdicts(gate.model_copy(update={"min_events": 40}))["list.ndcg@10[domain=films]"]


def test_a_slice_that_nobody_measured_fails_and_so_does_a_metric() -> None:
    (result,) = judge(SliceFloors(metric="list.ndcg@10", slices=("domain=toys*",), at_least=0))
    assert not result.passed and result.note == "no such slice among the metrics" and "domain=toys*" in result.gate
    (result,) = judge(SliceFloors(metric="list.mrr", slices=("all",), at_least=0))
    assert not result.passed and result.note == "not among the metrics of the slice"


def test_a_slice_is_compared_with_the_champion_on_its_own_events() -> None:
    gate = SliceFloors(metric="list.ndcg@10", slices=("new_user", "domain=*"), margin=0.01)
    comparison = {
        slice_metric("new_user", "list.ndcg@10"): {"estimate": 0.0, "low": -0.009, "high": 0.009},
        slice_metric("domain=books", "list.ndcg@10"): {"estimate": 0.0, "low": -0.011, "high": 0.011},
    }
    assert verdicts(gate, comparison=comparison) == {
        "champion:list.ndcg@10[new_user]": True,
        "champion:list.ndcg@10[domain=books]": False,
        "champion:list.ndcg@10[domain=films]": True,
    }
    assert verdicts(gate.model_copy(update={"min_events": 1}), comparison=comparison)["champion:list.ndcg@10[domain=films]"] is False


# --- calibration


def test_calibration_holds_over_all_and_on_every_slice() -> None:
    assert verdicts(CalibrationBand(min_events=100)) == {
        "calibration": True,
        "calibration[new_user]": False,
        "calibration[domain=books]": False,
        "calibration[domain=films]": True,
    }
    wide = CalibrationBand(slice_band=(0.8, 1.25), slices=("new_user",), ece=0.03)
    assert verdicts(wide) == {"calibration": True, "calibration.ece": True, "calibration[new_user]": True}
    assert not verdicts(wide.model_copy(update={"ece": 0.019}))["calibration.ece"]


@pytest.mark.parametrize(("ratio", "passed"), [(0.89, False), (0.9, True), (1.1, True), (1.11, False)])
def test_both_ends_of_the_band_count(ratio: float, passed: bool) -> None:
    (result,) = judge(CalibrationBand(slices=()), of_value(ratio))
    assert result.passed is passed


# --- latency and parity


def test_latency_is_what_the_promotion_measured_and_nothing_else() -> None:
    gate = LatencyBudget(p50_ms=20, p99_ms=100)
    claimed = {"latency": {"p50_ms": 1, "p99_ms": 2}}
    results = judge(gate, claimed)
    assert [result.passed for result in results] == [False, False]
    assert all(result.note == "was not measured by the promotion" for result in results)
    measured = {"latency": {"p50_ms": 10.0, "p99_ms": 101.0, "requests": 50, "k": 10}}
    assert verdicts(gate, metrics=claimed, measured=measured) == {"latency.p50_ms": True, "latency.p99_ms": False}


def test_parity_is_that_of_replayed_decisions_where_there_are_any() -> None:
    gate = ParityBound(at_most=1e-4, min_rows=10)
    assert verdicts(gate) == {"parity": True}
    for found, passed in (
        ({"max_difference": 1e-5, "rows": 10}, True),
        ({"max_difference": 1e-3, "rows": 10}, False),
        ({"max_difference": 1e-5, "rows": 9}, False),
        ({"rows": 10}, False),
        ({}, False),
    ):
        assert verdicts(gate, measured={"parity": found}) == {"parity": passed}, found


# --- recipes


class Recipe(Config):
    gates: tuple[Gate, ...]


def test_a_recipe_writes_gates_as_data() -> None:
    data = [
        {"kind": "bound", "metric": "a", "at_least": 1},
        {"kind": "against_champion", "metric": "b", "margin": 0.1},
        {"kind": "slices", "metric": "c", "slices": ["new_user"], "at_least": 0.1},
        {"kind": "calibration", "band": [0.8, 1.2]},
        {"kind": "latency", "p99_ms": 100},
        {"kind": "parity", "at_most": 0.1},
        {"kind": "schema"},
    ]
    kinds = [Bound, AgainstChampion, SliceFloors, CalibrationBand, LatencyBudget, ParityBound, SchemaCompatibility]
    assert [type(gate) for gate in parse(Recipe, {"gates": data}, source="r.yaml").gates] == kinds


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"kind": "bound", "metric": "a", "at_leats": 1}, r"r.yaml: gates.0.bound.at_leats: unknown key"),
        ({"kind": "schema", "strict": True}, r"gates.0.schema.strict: unknown key"),
        ({"kind": "slices", "metric": "a", "slices": ["b"]}, "expected at_least, margin or both, got neither"),
        ({"kind": "slices", "metric": "a", "slices": [], "at_least": 0}, r"gates.0.slices.slices"),
        ({"kind": "latency"}, "expected p50_ms, p99_ms or both, got neither"),
        ({"kind": "calibration", "band": [1.1, 0.9]}, r"band: expected the lower end first, got \[1.1, 0.9\]"),
        ({"kind": "bound", "metric": "a", "at_least": float("nan")}, "finite number"),
        ({"kind": "parity"}, "at_most: is required, but missing"),
        ({"kind": "nothing"}, "nothing"),
    ],
)
def test_a_malformed_gate_is_an_error_of_the_recipe(gate: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Recipe, {"gates": [gate]}, source="r.yaml")


@settings(max_examples=20)
@given(events=st.integers(1, 1000), least=st.integers(1, 1000))
def test_a_slice_is_judged_exactly_from_min_events_on(events: int, least: int) -> None:
    metrics = {"by_slice": {"s": {"events": events, "m": 0.0}}}
    (result,) = judge(SliceFloors(metric="m", slices=("s",), at_least=1, min_events=least), metrics)
    assert result.passed is (events < least)
