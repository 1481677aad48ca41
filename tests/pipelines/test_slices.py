# SPDX-License-Identifier: Apache-2.0
"""The slices that gates judge: which events they hold, what is measured on them, and that the promotion looks at them."""

import json
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
from rich.console import Console

from pipelines.recipe import Recipe
from pipelines.run import execute
from pipelines.steps.histories import Histories, build_histories
from pipelines.steps.prepared import Prepared, load_prepared
from pipelines.steps.ranker import load_ranking
from pipelines.steps.slices import event_slices
from recsys.core.config import load_recipe
from recsys.core.errors import DataError
from recsys.core.files import read_json
from recsys.evaluation.metrics.auc import auc
from recsys.evaluation.metrics.calibration import calibration_ratio
from tests.pipelines.small import SMALL


def step(home: Path, name: str) -> Path:
    (found,) = (home / "steps" / name).iterdir()
    return found


@pytest.fixture(scope="module")
def prepared(tiny_run) -> Prepared:
    return load_prepared(step(tiny_run.home, "splits"))


@pytest.fixture(scope="module")
def histories(prepared: Prepared) -> Histories:
    return build_histories(prepared)


def test_slices_hold_the_events_that_their_names_say(prepared: Prepared, histories: Histories) -> None:
    slices = event_slices(prepared, histories, ["gender"])
    test = prepared.parts["test"]
    earlier = set(prepared.parts["train"].column("user_id").to_pylist()) | set(prepared.parts["valid"].column("user_id").to_pylist())
    assert slices["all"].all() and len(slices["all"]) == test.num_rows
    assert slices["new_user"].tolist() == [user not in earlier for user in test.column("user_id").to_pylist()]
    trained = set(prepared.parts["train"].column("item_id").to_pylist())
    assert slices["warm_item"].tolist() == [item in trained for item in test.column("item_id").to_pylist()]
    assert np.array_equal(slices["head_item"], ~slices["tail_item"])
    gender = dict(zip(*(prepared.dataset.users.column(name).to_pylist() for name in ("user_id", "gender")), strict=True))
    assert slices["gender=F"].tolist() == [gender[user] == "F" for user in test.column("user_id").to_pylist()]
    assert np.array_equal(slices["gender=F"], ~slices["gender=M"])
    assert all(mask.any() for mask in slices.values())


def test_a_column_may_be_of_items_or_of_events(prepared: Prepared, histories: Histories) -> None:
    by_title = {name: mask for name, mask in event_slices(prepared, histories, ["title"]).items() if name.startswith("title=")}
    assert np.array_equal(np.sum(list(by_title.values()), axis=0), np.ones(len(by_title[next(iter(by_title))])))
    by_rating = event_slices(prepared, histories, ["rating"])
    values = prepared.parts["test"].column("rating")
    assert by_rating["rating=5"].sum() == pc.sum(pc.equal(values, 5.0)).as_py()


@pytest.mark.parametrize(
    ("column", "message"), [("occupatio", "did you mean 'occupation'"), ("genres", "expected one string for each row")]
)
def test_a_column_that_cannot_be_one_is_named(prepared: Prepared, histories: Histories, column: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        event_slices(prepared, histories, [column])


def test_what_is_measured_on_a_slice_is_of_its_events(tiny_run, prepared: Prepared, histories: Histories) -> None:
    metrics = read_json(tiny_run.directory / "bundle" / "metrics.json")
    slices, ranking = event_slices(prepared, histories), load_ranking(step(tiny_run.home, "ranker"))
    probability = ranking.probabilities["tokenmixer_large"]
    assert metrics["by_slice"].keys() == slices.keys()
    for name, mask in slices.items():
        figures = metrics["by_slice"][name]
        assert figures["events"] == mask.sum() == figures["list"]["events"] == figures["ranker"]["events"]
        area, ratio = auc(ranking.labels[mask], probability[mask]), calibration_ratio(ranking.labels[mask], probability[mask])
        assert figures["ranker"]["auc"] == (None if np.isnan(area) else pytest.approx(area))
        assert figures["ranker"]["calibration"] == (None if np.isnan(ratio) else pytest.approx(ratio))
    whole, parts = metrics["by_slice"]["all"], [metrics["by_slice"][name] for name in ("head_item", "tail_item")]
    assert whole["list"]["ndcg@10"] == pytest.approx(metrics["list"]["final"]["ndcg@10"])
    assert sum(part["events"] * part["list"]["ndcg@10"] for part in parts) / whole["events"] == pytest.approx(whole["list"]["ndcg@10"])


GATES = (
    "gates=[{kind: slices, metric: list.ndcg@10, slices: [new_user, 'gender=*'], at_least: 0, margin: 1, min_events: 1},"
    " {kind: calibration, band: [0, 99], ece: 1, min_events: 1}, {kind: latency, p99_ms: 60000, requests: 5},"
    " {kind: parity, at_most: 0.001}, {kind: schema}, {kind: against_champion, metric: list.ndcg@10, margin: 1}]"
)


@pytest.mark.slow
def test_a_run_judges_every_kind_of_gate_on_what_it_measured(tmp_path: Path) -> None:
    apart = "ranker.calibration={name: per_group, column: user_gender, base: {name: platt}, min_events: 50}"
    recipes = [load_recipe(Recipe, "quickstart", (*SMALL, GATES, "evaluation.slices=[gender]", own)) for own in ("seed=0", apart)]
    first, second = (execute(recipe, tmp_path, Console(quiet=True)) for recipe in recipes)
    mine, theirs = ({gate["gate"]: gate for gate in run.results["champion"]["gates"]} for run in (first, second))
    alone = {"list.ndcg@10[new_user]", "list.ndcg@10[gender=F]", "list.ndcg@10[gender=M]", "calibration", "calibration.ece"}
    alone |= {"latency.p99_ms", "parity", "calibration[gender=F]", "calibration[tail_item]"}
    assert alone <= mine.keys() and not any(name.startswith("champion:") or name == "schema" for name in mine)
    compared = {"schema", "champion:list.ndcg@10", "champion:list.ndcg@10[new_user]", "champion:list.ndcg@10[gender=F]"}
    assert alone | compared <= theirs.keys()
    assert all(gate["passed"] for gate in theirs.values()), [gate for gate in theirs.values() if not gate["passed"]]
    assert "5 requests of 10 items, on this machine" in theirs["latency.p99_ms"]["note"]
    release = json.loads(next((tmp_path / "steps" / "promote").glob("*/release.json")).read_text())
    assert release["promoted"]
    calibration = read_json(second.directory / "bundle" / "calibration.json")
    assert calibration["config"]["name"] == "per_group" and calibration["numbers"]["groups"].keys() == {"F", "M"}
    assert second.results["parity"] < 1e-4
