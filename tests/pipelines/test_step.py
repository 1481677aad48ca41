# SPDX-License-Identifier: Apache-2.0
"""`recsys step` on a data set that arrives in days: from nothing to a promoted bundle, late data, bad days, ranges, status."""

import json
import re
import shutil
from pathlib import Path

import polars as pl
import pytest

from pipelines.cli import main
from pipelines.graph import Outcome, Runner
from pipelines.pipeline import GRAPH, NAMES
from pipelines.recipe import Recipe
from pipelines.steps.materialise import online_path
from pipelines.steps.promote import load_release
from recsys.core.config import load_recipe
from recsys.core.errors import DataError
from recsys.data.ingest import read_dataset
from recsys.registry import Location, PromotionLog
from tests.pipelines.days import DAYS, EVENTS, events, write_all, write_day
from tests.pipelines.small import SMALL

CHECKS = "checks={columns: {rating: {type: number, low: 1, high: 5, nulls: 0}}, volume: {low: 50, factor: 3}, dropped: 0.1}"
GATE = "gates=[{kind: bound, metric: parity.max_difference, at_most: 0.0001}, {kind: against_champion, metric: list.ndcg@10, margin: 1.0}]"


def overrides(data: Path) -> tuple[str, ...]:
    """The recipe's, for data that `write_all` wrote."""
    where = {name: data / name for name in ("items.parquet", "users.parquet", "roles.yaml")}
    named = ", ".join(f"{path.stem}: {path}" for path in where.values())
    return (f"dataset={{name: daily, path: {data / 'events'}, {named}}}", *SMALL[1:], CHECKS, GATE)


def step(data: Path, home: Path, *arguments: str) -> int:
    sets = [part for override in overrides(data) for part in ("--set", override)]
    return main(["step", *arguments, "--home", str(home), *sets])


def outcomes(data: Path, home: Path, *targets: str, **options) -> list[Outcome]:
    return Runner(GRAPH, load_recipe(Recipe, "quickstart", overrides(data)), home).run(targets or NAMES, **options)


def made(found: list[Outcome]) -> list[tuple[str, str | None]]:
    return [(each.step, each.partition) for each in found if each.ran]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data and a home in which every step was run by the command."""
    folder = tmp_path_factory.mktemp("daily")
    write_all(folder / "data")
    assert step(folder / "data", folder / "home", "promote") == 0
    return folder / "data", folder / "home"


@pytest.fixture
def copied(finished: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same home, to be changed; the data are moved with it, so only what does not name their path is found again."""
    shutil.copytree(finished[1], tmp_path / "home")
    return finished[0], tmp_path / "home"


@pytest.mark.slow
def test_nothing_runs_again(finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    data, home = finished
    assert step(data, home, "promote") == 0
    assert re.search(rf"0 made, {2 * len(DAYS) + len(NAMES) - 2} there already\npromote: ", capsys.readouterr().out)
    assert PromotionLog(Location.under(home).log).champion("recsys").to_version == 1


def test_late_data_of_a_day_runs_it_alone_and_what_reads_all_days(tmp_path: Path) -> None:
    data, home = tmp_path / "data", tmp_path / "home"
    write_all(data)
    outcomes(data, home, "materialise")
    late = write_day(data, DAYS[2], events(DAYS[2], 77, 20), "part-1")
    again = outcomes(data, home, "materialise", "text")
    expected = [("ingest", DAYS[2]), ("validate", DAYS[2]), ("splits", None), ("text", None), ("materialise", None)]
    assert made(again) == expected
    (splits,) = [each for each in again if each.step == "splits"]
    whole = read_dataset(splits.result.directory / "dataset")
    assert whole.interactions.num_rows == len(DAYS) * EVENTS + 20
    late.unlink()
    assert made(outcomes(data, home, "splits")) == [], "what was is found again"


def test_the_item_texts_are_the_same_after_late_events_so_nothing_behind_them_runs(tmp_path: Path) -> None:
    data, home = tmp_path / "data", tmp_path / "home"
    write_all(data)
    outcomes(data, home, "tokenizer")
    write_day(data, DAYS[2], events(DAYS[2], 77, 20), "part-1")
    again = outcomes(data, home, "text")
    texts = [each.result.record.content for each in again if each.step == "text"]
    before = [json.loads(path.read_text())["content"] for path in (home / "steps" / "text").glob("*/step.json")]
    assert set(texts) == set(before) and len(before) == 2


@pytest.mark.slow
def test_a_change_of_the_recipe_runs_what_reads_it(finished: tuple[Path, Path], copied: tuple[Path, Path]) -> None:
    data, home = copied
    recipe = load_recipe(Recipe, "quickstart", (*overrides(data), "index={name: hnsw}"))
    assert made(Runner(GRAPH, recipe, home).run(["index"])) == [("index", None)]
    recipe = load_recipe(Recipe, "quickstart", (*overrides(data), "lists.validation_steps=40"))
    assert made(Runner(GRAPH, recipe, home).run(["bundle"])) == [("evaluate", None), ("bundle", None)]
    recipe = load_recipe(Recipe, "quickstart", (*overrides(data), "ranker.training.batch_size=256"))
    assert made(Runner(GRAPH, recipe, home).run(["ranker", "retriever", "materialise"])) == [("ranker", None)]


@pytest.mark.slow
def test_the_registry_has_its_say(copied: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data, home = copied
    again = outcomes(data, home)
    assert made(again) == []
    monkeypatch.setenv("RECSYS_TRACKING_URI", f"sqlite:///{home / 'another.db'}")
    found = outcomes(data, home)
    assert made(found) == [("promote", None)]
    online_path(load_recipe(Recipe, "quickstart", overrides(data)).features, home).unlink()
    assert ("materialise", None) in made(outcomes(data, home, "materialise"))


@pytest.mark.slow
def test_a_refused_bundle_is_judged_again_once_there_is_another_champion(copied: tuple[Path, Path]) -> None:
    data, home = copied
    strict = "gates=[{kind: bound, metric: ranking.ranker.auc, at_least: 0.999}]"
    sets = [part for override in (*overrides(data), strict) for part in ("--set", override)]
    assert main(["step", "promote", "--home", str(home), *sets]) == 1
    refused = load_recipe(Recipe, "quickstart", (*overrides(data), strict))
    assert made(Runner(GRAPH, refused, home).run(["promote"])) == []
    outcomes(data, home, "promote", force=("promote",))
    log = PromotionLog(Location.under(home).log)
    verdicts = [(event.action, event.to_version) for event in log.events("recsys") if event.action in ("promote", "refuse")]
    assert verdicts == [("promote", 1), ("refuse", 2), ("promote", 3)]
    (judged,) = [each for each in Runner(GRAPH, refused, home).run(["promote"]) if each.ran]
    assert load_release(judged.result.directory)["event"]["from_version"] == 3


@pytest.mark.slow
def test_a_promoted_bundle_stays_rolled_back(copied: tuple[Path, Path]) -> None:
    data, home = copied
    outcomes(data, home, "promote", force=("promote",))
    assert main(["rollback", "--home", str(home), "--reason", "a test"]) == 0
    assert made(outcomes(data, home)) == []
    assert PromotionLog(Location.under(home).log).champion("recsys").to_version == 1


def test_a_bad_day_stops_everything_behind_it_and_leaves_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, home = tmp_path / "data", tmp_path / "home"
    write_all(data)
    write_day(data, DAYS[3], events(DAYS[3], 3).with_columns(pl.lit(9.0).alias("rating")).head(60))
    assert step(data, home, "splits") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert (
        f"recsys: {DAYS[3]}: 2 checks failed: ranges of 'rating': 9.0 to 9.0, 60 of 60 outside, expected at least 1 and at most 5"
        in message
    )
    assert "volume: 60 events, expected 80 to 720 (median of 3 days before is 240)" in message
    assert not (home / "steps" / "splits").exists()
    assert sorted(path.name for path in (home / "steps" / "validate").iterdir()) == [*DAYS[:3], DAYS[3]]
    assert not list((home / "steps" / "validate" / DAYS[3]).iterdir())
    (report,) = (home / "work" / "validate" / DAYS[3]).glob("*/checks.json")
    assert sum(not each["passed"] for each in json.loads(report.read_text())["findings"]) == 2
    assert "FAILED" in report.with_name("checks.txt").read_text()
    write_day(data, DAYS[3], events(DAYS[3], 3))
    assert step(data, home, "splits") == 0


def test_a_file_in_the_wrong_day_is_refused_without_any_checks(tmp_path: Path) -> None:
    data, home = tmp_path / "data", tmp_path / "home"
    write_all(data)
    write_day(data, DAYS[1], events(DAYS[0], 5, 10), "moved")
    recipe = load_recipe(Recipe, "quickstart", (*overrides(data), "checks=null"))
    with pytest.raises(DataError, match=f"{DAYS[1]}: 1 checks failed: day of 'event_time': 10 of 250 events outside"):
        Runner(GRAPH, recipe, home).run(["splits"])


def test_a_range_is_backfilled_and_the_status_says_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, home = tmp_path / "data", tmp_path / "home"
    write_all(data)
    assert step(data, home, "validate", "--partitions", f"{DAYS[1]}:{DAYS[2]}") == 0
    assert sorted(path.name for path in (home / "steps" / "validate").iterdir()) == list(DAYS[1:3])
    assert step(data, home, "validate", "--partition", DAYS[4], "--only") == 2
    assert "ingest 2024-03-05: it is needed, but not there" in capsys.readouterr().err
    assert step(data, home, "validate", "--status") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = [line for line in lines if line and line[0] == "ingest"]
    assert [(line[1], line[-1]) for line in shown] == [(DAYS[0], "–"), (DAYS[1], shown[1][-1]), (DAYS[3], "–")]
    assert "fresh" in shown[1] and "missing" in shown[0] and "missing" in shown[2]
    for arguments, message in (
        (("validate", "--partitions", "2025-01-01:"), "none of the 5 there are"),
        (("validate", "--partition", "2025-01-01"), "partition '2025-01-01' is not there"),
        (("validate", "--partitions", "today"), "expected FIRST:LAST"),
        (("splits", "--partition", DAYS[0]), "step 'splits' has no partitions"),
        (("splitz",), "did you mean 'splits'"),
        ((), "expected the name of a step"),
    ):
        assert step(data, home, *arguments) == 2
        assert message in capsys.readouterr().err


def test_force_makes_one_step_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, home = tmp_path / "data", tmp_path / "home"
    write_all(data)
    step(data, home, "splits")
    capsys.readouterr()
    assert step(data, home, "splits", "--force") == 0
    assert "1 made, 10 there already" in capsys.readouterr().out


def test_the_list_names_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["step", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(NAMES)
