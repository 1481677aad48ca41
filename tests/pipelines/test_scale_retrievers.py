# SPDX-License-Identifier: Apache-2.0
"""`recsys scale` over retrievers: a tiny study along each axis, from recipe to report, and the shipped recipes on tiny data."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli import main
from pipelines.scale import load_scale_recipe
from recsys.core import components
from recsys.scaling.sweep import cells, subject_of
from tests.recsys.scaling.small import MODELS, SECTIONS, TRAINER, USERS, write_histories

FILES = {"cells.jsonl", "scaling.csv", "scaling.svg", "slices.svg", "report.html", "summary.json"}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    write_histories(tmp_path / "data")
    sizes = [{"label": "s", "set": {"dim": 8}}, {"label": "m", "set": {"dim": 16}}]
    content = {
        "name": "tiny",
        "data": {"name": "histories", "path": str(tmp_path / "data"), "held_out": 0.2, **SECTIONS},
        "rows": USERS,
        "seeds": [0],
        "flops": {"targets": [20_000, 60_000]},
        "amounts": {"rows": [20, USERS], "size": "m"},
        "training": {"batch_size": 16, "trainer": TRAINER},
        "architectures": [{"label": label, "model": model, "sizes": sizes, "multiple": 2} for label, model in MODELS.items()],
        "fit": {"baseline": "popularity", "resamples": 0},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "tiny.yaml")


def test_a_study_along_each_axis(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "scale" / "tiny"
    lines: dict[str, dict[str, Any]] = {}
    for axis, xs, new in (("params", {"params", "flops"}, 6), ("flops", {"params", "flops"}, None), ("data", {"rows"}, 3)):
        before = len(lines)
        assert main(["scale", recipe, "--axis", axis, "--home", str(tmp_path / "runs")]) == 0
        lines = {line["key"]: line for line in map(json.loads, (folder / "cells.jsonl").read_text().splitlines())}
        assert len(lines) - before == new or new is None
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["axis"] == axis and set(summary["laws"]) == xs and len(summary["points"]) == 6
        assert summary["baseline"] == {"name": "popularity", "ndcg@10": summary["references"]["popularity"]}
        for line in csv.DictReader((folder / "scaling.csv").open()):
            same = [cell for cell in lines.values() if (cell["architecture"], cell["flops"]) == (line["architecture"], int(line["flops"]))]
            (metrics,) = (cell["metrics"] for cell in same if cell["rows"] == int(line["rows"]))
            assert float(line["ndcg@10"]) == pytest.approx(metrics["ndcg@10"], abs=1e-6)
            assert float(line["gain"]) == pytest.approx(metrics["ndcg@10"] - summary["baseline"]["ndcg@10"], abs=2e-6)
            assert float(line["loss"]) == pytest.approx(metrics["loss"], abs=1e-6)
            assert float(line["ndcg@10.cold"]) == pytest.approx(metrics["ndcg@10.cold"], abs=1e-6)
            assert (line["loss.cold"] == "") == (line["architecture"] == "sasrec")
    assert {file.name for file in folder.iterdir() if file.is_file()} == FILES
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 2 and "NDCG@10 gain over popularity ∝ P^a: a" in page and "NDCG@10, cold items" in page
    assert "training users" in page and "cross-entropy" in page and "AUC" not in page
    assert "NDCG@10 gain over popularity" in " ".join(capsys.readouterr().out.split())


def test_a_model_and_an_index_that_do_not_fit_are_one_line(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", recipe, "--home", str(tmp_path), "--set", "data.index={name: dense}", "--only", "recgpt"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "architectures: recgpt: retriever 'recgpt' gives SlotLogProbs, but index 'dense' accepts SlotVectors" in error


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["scaling_setrec", "scaling_recgpt"])
def test_the_shipped_recipes_can_be_planned(name: str, quick: bool, tmp_path: Path) -> None:
    write_histories(tmp_path)
    encoder = [] if quick else ["data.text.encoder={name: hashing, dim: 384}"]  # as wide as the recipe's
    recipe = load_scale_recipe(name, [f"data.path={tmp_path}", "data.text.columns=[title]", *encoder], quick=quick)
    subject = subject_of(components.build("scaling_data", recipe.data), tmp_path)
    assert recipe.amounts is not None and max(recipe.amounts.rows) == recipe.rows
    for axis, count in (("params", len(recipe.params.targets)), ("flops", len(recipe.flops.targets)), ("data", len(recipe.amounts.rows))):
        made = cells(recipe, subject, axis)  # type: ignore[arg-type]
        assert len(made) == count * len(recipe.architectures) * len(recipe.seeds) and count >= 3
        for cell in made if axis == "params" else []:
            nearest = min(recipe.params.targets, key=lambda target: abs(target / cell.costs.dense - 1))
            assert 1 / 1.5 < cell.costs.dense / nearest < 1.5
