# SPDX-License-Identifier: Apache-2.0
"""`recsys scale`: a tiny study from recipe to report, going on, errors, and the shipped recipe."""

import csv
import json
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.cli import main
from pipelines.scale import execute, load_scale_recipe
from recsys.core import components
from recsys.core.config import read_recipe
from recsys.core.errors import ConfigError
from recsys.scaling.sweep import cells, subject_of

TINY = """
name: tiny
data: {name: planted, fields: 6, groups: 3, cardinality: [4, 8], latent: 1, dense: 0, logit_std: 3.0, bias: 0.0,
       valid: 100, test: 1500, reference: 1500}
rows: 640
seeds: [0, 1]
amounts: {rows: [320, 640], size: s}
training: {batch_size: 64, trainer: {epochs: 1, optimizer: {name: adam, learning_rate: 0.02}}}
architectures:
  - label: mixer
    model: {name: tokenmixer_large, tokenizer: {name: groups}, blocks: 1, embedding: {dim: 4, init_std: 0.1}}
    sizes: [{label: s, set: {dim: 8}}, {label: m, set: {dim: 16}}, {label: l, set: {dim: 24}}]
fit: {baseline: 0.4, resamples: 20}
quick: {seeds: [0], rows: 128, fit.resamples: 0}
"""
FILES = {"cells.jsonl", "scaling.csv", "scaling.svg", "report.html", "summary.json"}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return str(tmp_path / "tiny.yaml")


def test_a_study_from_the_command_line(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["scale", recipe, "--home", str(tmp_path / "runs")]
    assert main(arguments) == 0
    folder = tmp_path / "runs" / "scale" / "tiny"
    assert {file.name for file in folder.iterdir() if file.is_file()} == FILES
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["axis"] == "params" and summary["baseline"] == {"name": "0.4", "auc": 0.4}
    assert set(summary["laws"]) == {"params", "flops"} and {"auc", "log_loss", "only_main"} <= summary["references"].keys()
    for law in summary["laws"].values():
        exponent = law["gain"]["mixer"]["exponent"]
        assert exponent["low"] <= exponent["estimate"] <= exponent["high"]
    lines = [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    table = list(csv.DictReader((folder / "scaling.csv").open()))
    for line in table:
        aucs = [row["metrics"]["auc"] for row in lines if row["size"] == line["size"]]
        assert float(line["auc"]) == pytest.approx(sum(aucs) / 2, abs=1e-6)
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "<svg" in page and "Resolved recipe" in page
    assert "src=" not in page and "<link" not in page  # everything is inside it
    assert "6/6" in capsys.readouterr().out

    before = (folder / "cells.jsonl").read_bytes()
    assert main(arguments) == 0
    assert (folder / "cells.jsonl").read_bytes() == before and "there already" in capsys.readouterr().out

    assert main([*arguments, "--axis", "data"]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["laws"]) == {"rows"} and [point["rows"] for point in summary["points"]] == [320, 640]
    assert len((folder / "cells.jsonl").read_text().splitlines()) == 8  # 640 rows at size s stand there already


def test_quick_settings_go_before_overrides_and_into_a_folder_of_their_own(recipe: str, tmp_path: Path) -> None:
    quick = load_scale_recipe(recipe, quick=True)
    assert (quick.rows, quick.seeds, quick.fit.resamples) == (128, (0,), 0)
    assert load_scale_recipe(recipe, ["rows=64"], quick=True).rows == 64 and load_scale_recipe(recipe).rows == 640
    assert main(["scale", recipe, "--quick", "--set", "rows=64", "--home", str(tmp_path)]) == 0
    assert (tmp_path / "scale" / "tiny-quick" / "report.html").exists() and not (tmp_path / "scale" / "tiny").exists()


def test_a_baseline_can_be_known_of_the_data_or_an_architecture(recipe: str, tmp_path: Path) -> None:
    console = Console(quiet=True)

    def baseline(of: str) -> tuple[str, float]:
        study = execute(load_scale_recipe(recipe, [f"fit.baseline={of}", "fit.resamples=0"], quick=True), "params", tmp_path, console)
        return study.baseline.name, study.baseline.mean

    name, value = baseline("only_main")
    assert name == "only main" and 0.5 < value < 1
    name, value = baseline("mixer")
    assert name == "mixer s" and value == pytest.approx(
        json.loads((tmp_path / "cells.jsonl").read_text().splitlines()[0])["metrics"]["auc"]
    )
    with pytest.raises(ConfigError, match=r"fit\.baseline: unknown reference or architecture 'only_mian'; did you mean 'only_main'"):
        baseline("only_mian")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "rosw=3"], "--set rosw=3: rosw: unknown key 'rosw'; did you mean 'rows'"),
        (["--set", "data.name=plantde"], "unknown scaling_data 'plantde'; did you mean 'planted'"),
        (["--set", "data.groups=9"], "at least two fields"),
        (["--only", "mixr"], "--only: unknown architecture 'mixr'; did you mean 'mixer'"),
        (["--quick", "--set", "quick={}"], None),
    ],
)
def test_errors_are_one_line(
    recipe: str, tmp_path: Path, arguments: list[str], message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(
        ["scale", recipe, "--home", str(tmp_path), "--set", "rows=64", "--set", "seeds=[0]", "--set", "fit.resamples=0", *arguments]
    )
    if message is None:
        assert status == 0
        return
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1


def test_quick_without_such_a_section_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text(TINY[: TINY.index("quick:")])
    with pytest.raises(ConfigError, match="--quick: the recipe has no section 'quick'"):
        load_scale_recipe(str(tmp_path / "plain.yaml"), quick=True)


@pytest.mark.parametrize("quick", [False, True])
def test_the_shipped_recipe_can_be_planned(quick: bool) -> None:
    recipe = load_scale_recipe("scaling_planted", quick=quick)
    subject = subject_of(components.build("scaling_data", recipe.data), Path("nowhere"))
    for axis, count in (("params", len(recipe.params.targets)), ("flops", len(recipe.flops.targets)), ("data", len(recipe.amounts.rows))):
        made = cells(recipe, subject, axis)  # type: ignore[arg-type]
        assert len(made) == count * len(recipe.architectures) * len(recipe.seeds)
        for cell in made if axis == "params" else []:
            nearest = min(recipe.params.targets, key=lambda target: abs(target / cell.costs.dense - 1))
            assert 1 / 1.5 < cell.costs.dense / nearest < 1.5
    assert read_recipe("scaling_planted")[0]["name"] == "scaling_planted"
