# SPDX-License-Identifier: Apache-2.0
"""Gates pass and fail where they say."""

import pytest

from recsys.core.config import Config, parse
from recsys.core.errors import ConfigError
from recsys.registry import AgainstChampion, Bound, Gate, run_gates
from recsys.registry.gates import lookup

METRICS = {"ranking": {"model": {"auc": 0.75}}, "list": {"final": {"ndcg@10": 0.1}}, "flat.name": 3, "bad": float("nan"), "text": "x"}


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
    (result,) = run_gates((gate,), METRICS, None)
    assert result.passed is passed


def test_without_a_champion_only_bounds_are_run() -> None:
    gates = (Bound(metric="flat.name", at_least=1), AgainstChampion(metric="ndcg"))
    assert [r.gate for r in run_gates(gates, METRICS, None)] == ["flat.name"]


@pytest.mark.parametrize(("margin", "passed"), [(0.0, False), (0.02, True)])
def test_the_lower_end_of_the_interval_decides(margin: float, passed: bool) -> None:
    comparison = {"ndcg": {"estimate": 0.01, "low": -0.02, "high": 0.04}}
    (result,) = run_gates((AgainstChampion(metric="ndcg", margin=margin),), METRICS, comparison)
    assert result.passed is passed
    assert result.value == -0.02


def test_what_was_not_compared_fails() -> None:
    (result,) = run_gates((AgainstChampion(metric="auc"),), METRICS, {})
    assert not result.passed
    assert "not compared" in result.note


def test_a_recipe_writes_gates_as_data() -> None:
    class Recipe(Config):
        gates: tuple[Gate, ...]

    data = {"gates": [{"kind": "bound", "metric": "a", "at_least": 1}, {"kind": "against_champion", "metric": "b", "margin": 0.1}]}
    recipe = parse(Recipe, data, source="r.yaml")
    assert [type(g) for g in recipe.gates] == [Bound, AgainstChampion]
    with pytest.raises(ConfigError, match=r"r.yaml: gates.0.bound.at_leats: unknown key"):
        parse(Recipe, {"gates": [{"kind": "bound", "metric": "a", "at_leats": 1}]}, source="r.yaml")
