# SPDX-License-Identifier: Apache-2.0
"""`recsys efficiency`: a tiny study from recipe to report, its figures against direct ones, going on, errors, and the shipped recipe."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipelines.cli import main
from pipelines.efficiency import EfficiencyRecipe
from pipelines.study import load
from recsys.core.config import validate
from recsys.data.batch import SequenceBatch
from recsys.evaluation.metrics.ranking import ndcg_at
from recsys.evaluation.retrieval import event_ranks, vector_scorer
from recsys.retrieval.efficiency import RetrieverEfficiency
from recsys.scaling.retrievers import Retrievers
from recsys.scaling.tradeoff import POPULAR, WHOLE, recommended, settings
from recsys.training.progress import NoProgress
from recsys.training.trainer import Trainer
from tests.recsys.scaling.small import MODELS, TRAINER, USERS, source, write_histories

SIMILAR = {"history": {"scorer": {"name": "context"}, "selector": {"name": "mmr"}}}
FILES = {"cells.jsonl", "efficiency.csv", "efficiency.svg", "report.html", "summary.json"}


def content(data: Path, **changed: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "data": {"name": "histories", "path": str(data)},
        "rows": USERS,
        "seeds": [0, 1],
        "model": MODELS["sasrec"],
        "training": {"batch_size": 16, "trainer": TRAINER},
        "methods": [{"label": "similar", "efficiency": SIMILAR}],
        "budgets": [0.5, 0.3],
        "timed": 5,
        "rounds": 1,
        "quick": {"seeds": [0], "budgets": [0.5]},
        **changed,
    }


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    write_histories(tmp_path / "data")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content(tmp_path / "data")))
    return str(tmp_path / "tiny.yaml")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def test_a_study_from_recipe_to_report(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "efficiency" / "tiny"
    assert main(["efficiency", recipe, "--home", str(tmp_path / "runs")]) == 0
    lines = lines_of(folder)
    assert len(lines) == 2 * (1 + 4 * 2)
    assert {line["method"] for line in lines} == {"whole", "similar", "last", "popular", "random"}
    assert {file.name for file in folder.iterdir() if file.is_file()} == FILES
    whole = next(line for line in lines if line["method"] == WHOLE)
    for line in lines:
        assert line["cost"]["events"] <= whole["cost"]["events"]
        assert ("less_whole" in line) == (line["method"] != WHOLE)
        assert ("less_last" in line) == (line["method"] not in (WHOLE, "last"))
        if line["method"] in ("last", "random", "popular"):  # no arithmetic of their own
            assert line["cost"]["macs"] < whole["cost"]["macs"]
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["lines"]) == 9 and summary["seeds"] == [0, 1]
    table = list(csv.DictReader((folder / "efficiency.csv").open()))
    assert [row["method"] for row in table] == [line["method"] for line in summary["lines"]]
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 1 and "similar" in page and "multiply-adds" in page
    out = " ".join(capsys.readouterr().out.split())
    assert ("Recommended" in out) != ("No setting keeps enough" in out)
    before = (folder / "cells.jsonl").read_bytes()
    assert main(["efficiency", recipe, "--home", str(tmp_path / "runs")]) == 0  # nothing is trained or measured again
    assert (folder / "cells.jsonl").read_bytes() == before


def test_the_figures_are_those_of_the_model_asked_directly(recipe: str, tmp_path: Path) -> None:
    assert main(["efficiency", recipe, "--quick", "--home", str(tmp_path / "runs")]) == 0
    lines = {(line["method"], line["budget"]): line for line in lines_of(tmp_path / "runs" / "efficiency" / "tiny-quick")}
    assert len(lines) == 5
    plan = load(EfficiencyRecipe, recipe, quick=True)
    subject = Retrievers(source(tmp_path / "data", text=None, codes=None, collaborative=None), tmp_path / "shared")
    trainer = Trainer(plan.training.trainer, tmp_path / "again", progress=NoProgress())
    _, model = subject.train(plan.model, plan.rows, 0, plan.training.batch_size, trainer)
    split = subject.data.split
    counts = torch.bincount(torch.from_numpy(split.train.items), minlength=30)
    for method, efficiency in ((WHOLE, None), ("similar", SIMILAR)):
        budget = 1.0 if efficiency is None else 0.5
        if efficiency is not None:
            model.take_efficiency(validate(RetrieverEfficiency, {"history": {**efficiency["history"], "share": 0.5}}))
        ranks = event_ranks(vector_scorer(model), split.data, split.test, 100)
        assert lines[method, budget]["test"]["ndcg@10"] == pytest.approx(float(ndcg_at(ranks, 10).mean()), abs=1e-6)
    # The most popular half of each history, by hand.
    model.take_efficiency(None)
    ranks = []
    for start, event, target in zip(split.test.start, split.test.event, split.test.targets.values, strict=True):
        history = split.data.items[start:event]
        wanted = max(1, round(0.5 * len(history)))
        early = sorted(range(len(history) - 1), key=lambda i: (-int(counts[history[i]]), -i))[: wanted - 1]
        kept = history[sorted([*early, len(history) - 1])]
        items = torch.from_numpy(kept)
        state = model.encode(SequenceBatch(items, torch.tensor([0, len(items)]))).values.flatten()
        scores = (model.item_vectors() @ state).detach().numpy()
        scores[~model.scorable.numpy()] = -np.inf
        scores[history] = -np.inf
        ranks.append(np.inf if scores[target] == -np.inf else 1 + int((scores > scores[target]).sum()))
    found = float(ndcg_at(np.array(ranks, float), 10).mean())
    assert lines[POPULAR, 0.5]["test"]["ndcg@10"] == pytest.approx(found, abs=1e-6)


def test_a_method_may_be_a_schedule_inside_the_model(recipe: str, tmp_path: Path) -> None:
    schedule = {"schedule": {"keep": {0: 0.5}, "scorer": {"name": "transprune", "layers": [0]}, "selector": {"name": "top_k"}}}
    method = {"label": "inside", "efficiency": schedule, "budget": "schedule.keep.0"}
    (tmp_path / "inside.yaml").write_text(yaml.safe_dump(content(tmp_path / "data", methods=[method], seeds=[0], budgets=[0.5])))
    assert main(["efficiency", str(tmp_path / "inside.yaml"), "--home", str(tmp_path / "runs")]) == 0
    lines = {line["method"]: line for line in lines_of(tmp_path / "runs" / "efficiency" / "tiny")}
    assert lines["inside"]["cost"]["macs"] != lines["whole"]["cost"]["macs"]
    assert lines["inside"]["cost"]["events"] == lines["whole"]["cost"]["events"]


def test_the_recommendation_is_the_cheapest_that_validation_allows() -> None:
    plan = EfficiencyRecipe.model_construct(methods=(), budgets=(0.5, 0.25), max_loss=0.1)
    quality = {"whole": 0.5, "last": 0.46, "popular": 0.2, "random": 0.46}
    cost = {"last": 10.0, "popular": 1.0, "random": 12.0}
    rows = [
        {
            "method": s.method,
            "budget": s.budget,
            "valid": {"ndcg@10": quality[s.method]},
            "cost": {"macs": 100.0 if s.method == "whole" else cost[s.method] * s.budget},
        }
        for s in settings(plan)
    ]
    assert recommended(plan, rows) == ("last", 0.25)
    assert recommended(plan.model_copy(update={"max_loss": 0.01}), rows) is None


def test_bad_recipes_are_named(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = ["--home", str(tmp_path / "runs")]
    for setting, text in (
        ("budgets=[1.5]", "less than or equal to 1"),
        ("methods=[{label: last, efficiency: {history: {scorer: {name: recency}, selector: {name: top_k}}}}]", "labels that differ"),
        ("methods=[{label: x, efficiency: {history: {scorer: {name: recencies}, selector: {name: top_k}}}}]", "did you mean 'recency'"),
    ):
        assert main(["efficiency", recipe, *home, "--set", setting]) == 2
        assert text in capsys.readouterr().err
    assert main(["efficiency", recipe, *home, "--set", "data={name: planted}"]) == 2
    assert "expected histories for a retriever, got 'planted'" in capsys.readouterr().err


@pytest.mark.parametrize("quick", [False, True])
def test_the_shipped_recipe_can_be_planned(quick: bool) -> None:
    plan = load(EfficiencyRecipe, "efficiency_movielens_1m", quick=quick)
    assert len(settings(plan)) == 1 + (len(plan.methods) + 3) * len(plan.budgets)
