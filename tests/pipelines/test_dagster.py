# SPDX-License-Identifier: Apache-2.0
"""Dagster over the steps: the same results as the runner's, data checks that block, days, backfills, the schedule, the web UI."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from pipelines.checks import KINDS
from pipelines.graph import Runner
from pipelines.orchestration.assets import JOB, RANGE_END, RANGE_START, SCHEDULE, definitions, partitions, request
from pipelines.pipeline import GRAPH, NAMES
from pipelines.recipe import Recipe
from pipelines.steps.demo import free_port
from recsys.core.config import load_recipe
from tests.pipelines.days import DAYS, events, write_all, write_day
from tests.pipelines.small import SMALL
from tests.pipelines.test_step import overrides

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_all(tmp_path / "data")
    return tmp_path / "data"


def recipe_of(data: Path) -> Recipe:
    return load_recipe(Recipe, "quickstart", overrides(data))


def run_range(defs: dg.Definitions, first: str, last: str, *names: str, instance: dg.DagsterInstance | None = None):
    """One run over the days of a range."""
    tags = {RANGE_START: first, RANGE_END: last}
    assets = [each for each in defs.assets or [] if isinstance(each, dg.AssetsDefinition)]
    chosen = dg.AssetSelection.assets(*names) if names else None
    return dg.materialize(assets, selection=chosen, tags=tags, partition_key=None, raise_on_error=False, instance=instance)


def materialised(result: dg.ExecuteInProcessResult) -> list[tuple[str, str | None]]:
    found = result.get_asset_materialization_events()
    return [(event.asset_key.to_user_string(), event.partition) for event in found]


def metadata(result: dg.ExecuteInProcessResult, name: str) -> dict[str, object]:
    (event, *_) = [e for e in result.get_asset_materialization_events() if e.asset_key.to_user_string() == name]
    return {key: value.value for key, value in event.materialization.metadata.items()}


@pytest.mark.slow
def test_what_dagster_makes_is_what_the_runner_makes(data: Path, tmp_path: Path) -> None:
    home = tmp_path / "dagster"
    defs = definitions(recipe_of(data), home)
    done = run_range(defs, DAYS[0], DAYS[-1])
    assert done.success
    assert {name for name, _ in materialised(done)} == set(NAMES)
    assert {day for name, day in materialised(done) if name == "ingest"} == set(DAYS)
    assert all(check.passed for check in done.get_asset_check_evaluations()) and done.get_asset_check_evaluations()
    found = Runner(GRAPH, recipe_of(data), home).run(NAMES)
    assert not [each for each in found if each.ran], "the runner finds everything there"
    nothing = request(Runner(GRAPH, recipe_of(data), home), DAYS[-1])
    assert isinstance(nothing, dg.SkipReason) and nothing.skip_message == "every step is fresh"
    other = tmp_path / "runner"
    Runner(GRAPH, recipe_of(data), other).run(["retriever", "index", "ranker", "features"])
    mine = {name: text for name, text in hashed(other).items() if not name.endswith("metrics.jsonl")}
    assert mine.items() <= hashed(home).items()
    again = run_range(defs, DAYS[0], DAYS[-1])
    assert again.success
    assert {name: metadata(again, name)["made"] for name in NAMES} == dict.fromkeys(NAMES, 0)


def hashed(home: Path) -> dict[str, bytes]:
    root = home / "steps"
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "step.json"}


def test_a_bad_day_fails_its_check_and_blocks_what_is_behind(data: Path, tmp_path: Path) -> None:
    write_day(data, DAYS[1], events(DAYS[1], 3).with_columns(pl.lit(9.0).alias("rating")))
    defs = definitions(recipe_of(data), tmp_path / "home")
    done = run_range(defs, DAYS[0], DAYS[-1], "ingest", "validate", "splits", "text")
    assert not done.success
    assert {name for name, _ in materialised(done)} == {"ingest"}
    failed = {check.check_name: check for check in done.get_asset_check_evaluations() if not check.passed}
    assert set(failed) == {"ranges"} and {check.check_name for check in done.get_asset_check_evaluations()} == set(KINDS)
    assert "ranges of 'rating': 9.0 to 9.0, 240 of 240 outside" in str(failed["ranges"].description)
    assert not (tmp_path / "home" / "steps" / "splits").exists()


def test_a_backfill_goes_through_its_days_and_only_these(data: Path, tmp_path: Path) -> None:
    defs = definitions(recipe_of(data), tmp_path / "home")
    done = run_range(defs, DAYS[1], DAYS[2], "ingest", "validate")
    assert done.success
    assert sorted(materialised(done)) == sorted((name, day) for name in ("ingest", "validate") for day in DAYS[1:3])
    assert sorted(path.name for path in (tmp_path / "home" / "steps" / "validate").iterdir()) == list(DAYS[1:3])
    blocked = run_range(defs, DAYS[1], DAYS[2], "splits")
    assert not blocked.success, "the other days are not there"
    resolved = defs.resolve_asset_graph()
    policies = {name: resolved.get(dg.AssetKey(name)).backfill_policy for name in ("ingest", "validate")}
    assert all(policy == dg.BackfillPolicy.single_run() for policy in policies.values())


def test_one_day_is_one_partition(data: Path, tmp_path: Path) -> None:
    defs = definitions(recipe_of(data), tmp_path / "home")
    job = defs.resolve_job_def(JOB)
    done = job.execute_in_process(partition_key=DAYS[0], asset_selection=[dg.AssetKey("ingest"), dg.AssetKey("validate")])
    assert done.success and sorted(materialised(done)) == [("ingest", DAYS[0]), ("validate", DAYS[0])]


def test_days_begin_with_the_first_of_the_data_and_lie_in_utc(data: Path) -> None:
    found = partitions(recipe_of(data))
    assert isinstance(found, dg.DailyPartitionsDefinition)
    keys = found.get_partition_keys(current_time=datetime(2024, 3, 6, 0, 1, tzinfo=UTC))
    assert tuple(keys) == DAYS
    whole = load_recipe(Recipe, "quickstart", SMALL)
    assert list(partitions(whole).get_partition_keys()) == ["all"]


def test_the_schedule_asks_for_all_days_that_are_not_done(data: Path, tmp_path: Path) -> None:
    home, recipe = tmp_path / "home", recipe_of(data)
    first = request(Runner(GRAPH, recipe, home), DAYS[3])
    assert isinstance(first, dg.RunRequest)
    assert (first.tags[RANGE_START], first.tags[RANGE_END]) == (DAYS[0], DAYS[3])
    Runner(GRAPH, recipe, home).run(["splits"])
    write_day(data, DAYS[2], events(DAYS[2], 77, 20), "part-1")
    late = request(Runner(GRAPH, recipe, home), DAYS[4])
    assert isinstance(late, dg.RunRequest)
    assert (late.tags[RANGE_START], late.tags[RANGE_END]) == (DAYS[2], DAYS[4])
    defs = definitions(recipe, home)
    schedule = defs.resolve_schedule_def(SCHEDULE)
    context = dg.build_schedule_context(scheduled_execution_time=datetime(2024, 3, 6, 3, 30, tzinfo=UTC))
    (asked,) = schedule.evaluate_tick(context).run_requests
    assert {name: asked.tags[name] for name in late.tags} == dict(late.tags)
    done = run_range(defs, DAYS[2], DAYS[4], "ingest", "validate", "splits")
    assert done.success
    assert metadata(done, "ingest")["made"] == 1 and metadata(done, "splits")["made"] == 1


def test_the_commands_work_without_dagster() -> None:
    hide = "import sys; sys.modules['dagster'] = None; sys.modules['dagster_webserver'] = None; "
    listed = hide + "from pipelines.cli import main; sys.exit(main(['step', '--list']))"
    assert subprocess.run([sys.executable, "-c", listed], cwd=ROOT, capture_output=True, check=False).returncode == 0
    asked = hide + "from pipelines.cli import main; sys.exit(main(['dagster', 'quickstart', '--set', 'dataset={name: synthetic}']))"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "dagster and dagster-webserver are not installed" in done.stderr


@pytest.mark.slow
def test_the_web_ui_answers_on_this_machine(data: Path, tmp_path: Path) -> None:
    port = free_port()
    sets = [part for override in overrides(data) for part in ("--set", override)]
    options = ["--home", str(tmp_path / "home"), "--port", str(port), *sets]
    log = (tmp_path / "log").open("wb")
    asked_for = [sys.executable, "-m", "pipelines.cli", "dagster", "quickstart", *options]
    process = subprocess.Popen(asked_for, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        until = time.monotonic() + 300
        while time.monotonic() < until and process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=5) as answer:
                    assert answer.status == 200 and b"dagster_version" in answer.read()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            raise AssertionError((tmp_path / "log").read_text())
        query = b'{"query": "{ assetNodes { assetKey { path } } }"}'
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/graphql", query, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            text = answer.read().decode()
        assert all(f'"{name}"' in text for name in NAMES)
        process.terminate()
        process.wait(150)
        assert (tmp_path / "home" / "dagster").is_dir()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
