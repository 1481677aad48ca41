# SPDX-License-Identifier: Apache-2.0
"""A repository of Feast on our stores, in Feast's own environment, beside the same one on Feast's own stores."""

import json
import os
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import build, python_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
QUESTIONS, TWICE = 36, 35
OWN = {"offline_store": {"type": "file"}, "online_store": {"type": "sqlite", "path": "own.db"}}


@pytest.fixture(scope="session")
def feast() -> Path:
    """The interpreter of Feast's environment, which is built where it is not there."""
    build("feast")
    return python_of("feast")


def run(feast: Path, folder: Path, stores: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    config = {"project": "p", "provider": "local", "registry": "registry.db", "entity_key_serialization_version": 3, **stores}
    (folder / "feature_store.yaml").write_text(json.dumps(config))  # JSON is YAML
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "FEAST_USAGE": "False"}
    command = [str(feast), str(Path(__file__).parent / "feast_repo.py"), str(folder), str(folder / "found.json")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def on_ours(store: dict[str, Any], **offline: Any) -> dict[str, Any]:
    return {
        "offline_store": {"type": "feature_store.feast.offline_store.RecsysOfflineStore", **offline},
        "online_store": {"type": "feature_store.feast.online_store.RecsysOnlineStore", "store": store},
    }


@pytest.fixture(scope="session")
def theirs(feast: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(feast, tmp_path_factory.mktemp("feast") / "own", OWN)


@pytest.fixture(scope="session", params=["sqlite", "redis"])
def ours(request: pytest.FixtureRequest, feast: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    store = {"name": "sqlite", "path": "data/ours.db"}
    if request.param == "redis":
        store = {"name": "redis", "url": request.getfixturevalue("redis_url"), "prefix": uuid.uuid4().hex}
    return run(feast, tmp_path_factory.mktemp("ours") / "repo", on_ours(store))


def test_our_stores_read_what_feasts_own_read_online(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for moment in ("before", "materialized", "again", "pushed"):
        assert ours[moment] == theirs[moment], moment
    assert ours["pushed"]["trips"][1] == 5 and ours["before"]["trips"] == [None] * 7
    assert ours["again"]["duration"] == [1.5] * 7


def test_an_older_row_replaces_no_newer_one(ours: dict[str, Any]) -> None:
    assert ours["older"] == ours["pushed"]


def test_a_view_that_was_deleted_has_no_rows_when_it_comes_back(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["deleted"]["duration"] == theirs["deleted"]["duration"] == [None] * 7
    assert ours["deleted"]["trips"] == ours["pushed"]["trips"]


def test_every_question_is_answered_in_its_place_as_feast_answers_those_that_it_keeps(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["order"] == list(range(QUESTIONS))
    assert ours["full_names"] == theirs["full_names"]
    by_row = {row["row"]: row for row in ours["historical"]}
    assert 0 < len(theirs["historical"]) < QUESTIONS
    for row in theirs["historical"]:
        assert by_row[row["row"]] == row
    assert {**by_row[TWICE], "row": 2, "origin": "", "target": "", "duration": 0} == {
        **by_row[2],
        "origin": "",
        "target": "",
        "duration": 0,
    }


def test_what_feast_leaves_out_is_there_without_values(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    kept = {row["row"] for row in theirs["historical"]} | {TWICE, 2}
    lost = [row for row in ours["historical"] if row["row"] not in kept]
    assert lost and all(row["trips"] is None or row["duration"] is None for row in lost)
    assert any(row["trips"] is not None for row in lost)  # Feast leaves out what one view knows where another knows nothing


def test_nothing_heavy_is_imported(ours: dict[str, Any]) -> None:
    assert ours["torch"] == []


def test_rows_may_count_from_their_created_time_on(feast: Path, tmp_path: Path, ours: dict[str, Any]) -> None:
    found = run(feast, tmp_path / "repo", on_ours({"name": "sqlite", "path": "ours.db"}, created_is_available=True))
    by_row, without = ({row["row"]: row for row in each["historical"]} for each in (found, ours))
    # A question at 1:00 sees a row of 1:00 only where created times do not count, one at 2:30 not the correction that was written at 9:00.
    assert [by_row[row]["trips"] for row in (1, 2)] == [None, 2]
    assert [without[row]["trips"] for row in (1, 2)] == [777, 2]
