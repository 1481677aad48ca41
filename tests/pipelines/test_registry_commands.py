# SPDX-License-Identifier: Apache-2.0
"""`recsys promote`, `rollback`, `history` and `gc` on a registry of small bundles."""

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from recsys.registry import Location, Registry
from tests.recsys.registry.small import BETTER, GATE, NOT_WORSE, WORSE, evidence, register, write_bundle


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, which take seconds to make."""
    folder = tmp_path_factory.mktemp("mlflow")
    Registry(Location.under(folder)).models()
    return folder / "mlflow.db"


@pytest.fixture
def home(database: Path, tmp_path: Path) -> Path:
    """A registry with three versions, none of them judged; the gates of the third fail."""
    (tmp_path / "home").mkdir()
    shutil.copy(database, tmp_path / "home")
    registry = Registry(Location.under(tmp_path / "home"))
    for number, auc in ((1, 0.6), (2, 0.7), (3, 0.2)):
        write_bundle(tmp_path / f"bundle{number}", auc=auc, features=f"f{number}")
        register(registry, tmp_path / f"bundle{number}")
    return tmp_path / "home"


def run(home: Path, verb: str, *arguments: str) -> int:
    named = [] if verb == "gc" else ["--name", "m"]
    return main([verb, "--home", str(home), *named, *arguments])


def history(home: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[Any]:
    capsys.readouterr()
    assert run(home, "history", "--json", *arguments) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def error(home: Path, capsys: pytest.CaptureFixture[str], verb: str, *arguments: str) -> str:
    capsys.readouterr()
    assert run(home, verb, *arguments) == 2
    return capsys.readouterr().err


def test_a_version_goes_all_the_way_and_back(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, "promote", "1", "--reason", "the first", "--actor", "ann") == 0
    assert "promoted version 1" in capsys.readouterr().out
    assert "must be compared with it" in error(home, capsys, "promote", "2")
    registry = Registry(Location.under(home))
    registry.validate("m", 2, gates=(GATE, NOT_WORSE), evidence=evidence(BETTER), expected=1)
    assert run(home, "promote", "2", "--to", "shadow") == 0
    assert run(home, "promote", "challenger", "--to", "canary=5") == 0
    assert "tries as canary version 2" in " ".join(capsys.readouterr().out.split())
    assert run(home, "promote", "challenger") == 0, "with the comparison that the log holds"
    assert run(home, "rollback", "--reason", "worse on new users", "--actor", "bob") == 0
    events = history(home, capsys)
    assert [(event["action"], event["to_version"]) for event in events] == [
        *(("register", version) for version in (1, 2, 3)),
        ("validate", 1),
        ("promote", 1),
        ("validate", 2),
        ("shadow", 2),
        ("canary", 2),
        ("promote", 2),
        ("rollback", 1),
    ]
    assert [(event["actor"], event["reason"]) for event in (events[4], events[-1])] == [("ann", "the first"), ("bob", "worse on new users")]
    assert run(home, "history") == 0
    assert "canary 5%" in capsys.readouterr().out


def test_a_comparison_with_another_champion_does_not_count(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, "promote", "1") == 0
    registry = Registry(Location.under(home))
    registry.validate("m", 2, gates=(GATE,), evidence=evidence(BETTER), expected=1)
    assert run(home, "promote", "3", "--override", "--actor", "ann", "--reason", "in need") == 0
    assert "must be compared with it" in error(home, capsys, "promote", "2")


def test_the_gates_of_the_recipe_decide_unless_somebody_answers_for_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, "promote", "3") == 1
    assert "refused version 3" in " ".join(capsys.readouterr().out.split())
    assert run(home, "promote", "3", "--to", "canary=5") == 1
    assert "override.actor: expected who answers for it" in error(home, capsys, "promote", "3", "--override", "--reason", "in need")
    assert "override.reason: expected who answers for it" in error(home, capsys, "promote", "3", "--override", "--actor", "ann")
    assert run(home, "promote", "3", "--override", "--actor", "ann", "--reason", "in need") == 0
    last = history(home, capsys)[-1]
    assert (last["action"], last["actor"], last["details"]["override"]["failed"]) == ("promote", "ann", ["auc"])


def test_a_worse_candidate_does_not_pass_by_the_command(home: Path) -> None:
    assert run(home, "promote", "1") == 0
    Registry(Location.under(home)).validate("m", 2, gates=(GATE, NOT_WORSE), evidence=evidence(WORSE), expected=1)
    assert run(home, "promote", "2") == 1


def test_what_was_live_at_a_time(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, "promote", "1") == 0
    log = Registry(Location.under(home)).log
    first = log.champion("m").time
    assert run(home, "promote", "2", "--override", "--actor", "ann", "--reason", "in need") == 0
    (now,) = history(home, capsys, "--at", log.champion("m").time.isoformat())
    assert (now["champion"]["to_version"], now["previous"]["to_version"], now["canary"]) == (2, 1, None)
    (then,) = history(home, capsys, "--at", first.isoformat())
    assert (then["champion"]["to_version"], then["previous"]) == (1, None)
    (before,) = history(home, capsys, "--at", (first - timedelta(days=1)).isoformat())
    assert set(before.values()) == {None}
    capsys.readouterr()
    assert run(home, "history", "--at", first.isoformat()) == 0
    assert "champion" in capsys.readouterr().out
    assert "--at: expected a time such as" in error(home, capsys, "history", "--at", "yesterday")


@pytest.mark.parametrize("to", ["canary", "canary=x", "shadow=5", "registered", "live"])
def test_states_that_nobody_can_ask_for(home: Path, capsys: pytest.CaptureFixture[str], to: str) -> None:
    assert f"--to: expected champion, canary=PERCENT, shadow, validated or retired, got '{to}'" in error(
        home, capsys, "promote", "1", "--to", to
    )


def test_a_version_is_withdrawn_and_retired(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, "promote", "1", "--to", "canary=5") == 0
    assert run(home, "promote", "1", "--to", "validated") == 0
    assert run(home, "promote", "1", "--to", "retired") == 0
    assert [event["action"] for event in history(home, capsys)][3:] == ["validate", "canary", "withdraw", "retire"]
    assert "not in the registry" in error(home, capsys, "promote", "challenger")


def test_garbage_is_told_and_collected(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, "promote", "2") == 0
    capsys.readouterr()
    assert run(home, "gc", "--keep", "1", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "m/1" in told and "would remove 1 things" in told
    assert run(home, "gc", "--keep", "1") == 0
    assert capsys.readouterr().out == told.replace("would remove", "removed")
    assert [int(record.version) for record in Registry(Location.under(home)).versions("m")] == [2, 3]
    assert "keep: expected at least 1" in error(home, capsys, "gc", "--keep", "0")
