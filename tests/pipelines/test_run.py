# SPDX-License-Identifier: Apache-2.0
"""A whole run: what it leaves behind, a second one beside the first, and one whose gates fail."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipelines.cli import main
from pipelines.recipe import Recipe
from pipelines.run import execute, promoted
from recsys.core.config import load_recipe, parse
from recsys.core.errors import ConfigError
from recsys.data.encode import Encoder
from recsys.registry import Location, PromotionLog
from tests.pipelines.small import SMALL


def with_open_ids(recipe: Recipe) -> Recipe:
    """The ranker's occupations are hashed, and its items come and go."""
    content = recipe.encoder.model_dump(mode="json")
    for feature in content["features"]:
        feature |= {"user_occupation": {"ids": "hashed", "rows": 16}}.get(feature.get("feature"), {})
        feature |= {"ids": "raw", "rows": 40} if feature["kind"] == "sequence" else {}
    return recipe.model_copy(update={"encoder": parse(Encoder.Config, content, source="test")})


@pytest.fixture
def home(tiny_run, tmp_path: Path) -> Path:
    """A copy of the registry that the first run left, so that a second run changes nothing for other tests."""
    return Path(shutil.copytree(tiny_run.home, tmp_path / "home"))


def test_the_summary_has_what_it_promises(tiny_run) -> None:
    summary = json.loads((tiny_run.directory / "summary.json").read_text())
    for model in ("tokenmixer_large", "logistic_regression", "base_rate"):
        assert {"auc", "gauc", "logloss", "ne"} <= summary["ranking"][model].keys()
    for model in ("setrec", "sasrec", "item_knn", "text_knn", "repeat_last", "popularity"):
        assert {"recall@10", "recall@50", "ndcg@10"} <= summary["retrieval"][model].keys()
    for kind in ("final", "retriever"):
        assert {"recall@10", "ndcg@10"} <= summary["list"][kind].keys()
    assert {"version", "sha256", "gates"} <= summary["champion"].keys()
    assert len(summary["served"]["known_user"]["items"]) == len(summary["served"]["new_user"]["items"]) == 10
    assert summary["served"]["new_user"]["flags"] == ["new_user"]
    assert summary["seconds"] > 0
    assert summary["ranking"]["base_rate"]["auc"] == 0.5
    assert summary["retrieval"]["setrec"]["recall@10"] > summary["retrieval"]["popularity"]["recall@10"]


def test_every_model_is_measured_on_every_kind_of_target_that_there_is(tiny_run) -> None:
    slices = json.loads((tiny_run.directory / "summary.json").read_text())["slices"]
    retrieval, page = tiny_run.results["retrieval"], (tiny_run.directory / "report.html").read_text()
    assert {"all", "warm", "head", "tail", "cold_user", "empty_user"} <= slices.keys()
    total = slices["all"]["targets"]
    for one, other in (("warm", "cold"), ("head", "tail"), ("new", "repeated")):
        parts = [slices[kind] for kind in (one, other) if kind in slices]
        assert sum(part["targets"] for part in parts) == total and all(part["targets"] for part in parts)
        for name, whole in retrieval["models"].items():
            for metric in ("ndcg@10", "recall@10"):
                mean = sum(part["targets"] * part["models"][name][metric] for part in parts) / total
                assert mean == pytest.approx(whole["all"][metric]) == pytest.approx(slices["all"]["models"][name][metric])
    for words in ("By kind of target", "tail items", "text-kNN", "repeat last", f"{slices['tail']['models']['setrec']['ndcg@10']:.4f}"):
        assert words in page
    assert ("cold items</th>" in page) == ("cold" in slices), "kinds without targets are left out"


def test_offline_scores_are_the_served_ones(tiny_run) -> None:
    assert tiny_run.results["parity"] < 1e-4


def test_the_report_is_one_self_contained_file(tiny_run) -> None:
    page = (tiny_run.directory / "report.html").read_text()
    assert page.count("<svg") == 5
    assert "src=" not in page
    assert "<link" not in page
    for words in ("TokenMixer-Large", "What was served", "brand-new-user", "Calibration", "Learning curves", "it was promoted"):
        assert words.lower() in page.lower()


def test_a_second_run_is_compared_with_the_champion(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accept = "gates=[{kind: against_champion, metric: list.ndcg@10, margin: 1.0}]"
    sampled = ("ranker.negatives=0.25", "ranker.calibration={name: undersampling, rate: 0.25}")
    other = ("ranker.model.name=unimixer", "ranker.model.embedding.managed={item_id: {interval: 5}}", *sampled)
    run = execute(with_open_ids(load_recipe(Recipe, "quickstart", (*SMALL, accept, *other))), home, Console(quiet=True))
    (gate,) = run.results["champion"]["gates"]
    assert promoted(run)
    assert gate["gate"] == "champion:list.ndcg@10"
    assert "difference" in gate["note"]
    events = PromotionLog(Location.under(home).log).events("recsys")
    assert [(e.action, e.to_version) for e in events] == [
        (done, version) for version in (1, 2) for done in ("register", "validate", "promote")
    ]
    assert run.results["served"]["known_user"]["model"]["version"] == 2
    assert run.results["parity"] < 1e-4
    frames = (run.directory / "frames" / "train.parquet", run.directory / "ranker" / "train_sampled.parquet")
    labels, kept = (pq.read_table(path)["rating"].to_numpy() >= 4 for path in frames)
    assert kept.sum() == labels.sum()
    assert (~kept).sum() == pytest.approx(0.25 * (~labels).sum(), rel=0.2)
    state = json.loads(next(run.directory.rglob("calibration.json")).read_text())
    assert state["config"] == {"name": "undersampling", "rate": 0.25}
    assert main(["rollback", "--home", str(home), "--reason", "a test"]) == 0
    assert main(["history", "--home", str(home), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(line["action"], line["to_version"]) for line in lines][2::3] == [("promote", 1), ("promote", 2)]
    assert (lines[-1]["action"], lines[-1]["to_version"]) == ("rollback", 1)


def test_the_same_run_again_makes_nothing_and_reports_the_same(tiny_run, home: Path) -> None:
    steps = {path: path.stat().st_mtime_ns for path in (home / "steps").rglob("step.json")}
    again = execute(tiny_run.recipe, home, Console(quiet=True))
    assert {path: path.stat().st_mtime_ns for path in (home / "steps").rglob("step.json")} == steps
    assert [e.action for e in PromotionLog(Location.under(home).log).events("recsys")] == ["register", "validate", "promote"]
    first, second = (json.loads((run.directory / "summary.json").read_text()) for run in (tiny_run, again))
    for name in ("ranking", "retrieval", "list", "intervals", "champion", "latency"):
        assert first[name] == second[name]
    for name in ("frames/train.parquet", "ranker/metrics.jsonl", "bundle/manifest.json"):
        assert (again.directory / name).read_bytes() == (tiny_run.directory / name).read_bytes()


def test_a_failed_gate_ends_with_status_1_and_a_report(home: Path) -> None:
    refuse = "gates=[{kind: bound, metric: ranking.tokenmixer_large.auc, at_least: 0.999}]"
    overrides = [part for override in (*SMALL, refuse) for part in ("--set", override)]
    assert main(["run", "quickstart", "--home", str(home), *overrides]) == 1
    log = PromotionLog(Location.under(home).log)
    assert log.champion("recsys").to_version == 1
    assert log.events("recsys")[-1].action == "refuse"
    newest = max((home / "quickstart").iterdir())
    assert "It was refused" in (newest / "report.html").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ranker.negatives=0.5"], "calibration: none, but negatives is 0.5; expected undersampling, platt or isotonic"),
        (["ranker.calibration={name: undersampling, rate: 0.5}"], "calibration.rate: expected the value of negatives, 1, got 0.5"),
        (["ranker.negatives=0"], "ranker.negatives"),
    ],
)
def test_sampled_negatives_without_their_correction_are_an_error(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(Recipe, "quickstart", overrides)


def test_a_typo_in_an_override_names_the_nearest_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", "--set", "ranker.model.bloks=3"]) == 2
    assert "did you mean 'blocks'" in capsys.readouterr().err
