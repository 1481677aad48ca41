# SPDX-License-Identifier: Apache-2.0
"""`recsys gc`: what stays, what goes, and that a run killed anywhere is finished by the next one."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recsys.bundle.manifest import verify
from recsys.core.errors import RegistryError
from recsys.registry import Entry, Location, Registry
from recsys.registry.artifacts import remove, set_writable
from recsys.registry.collect import Garbage, collect
from recsys.training.tracking import start_run
from tests.recsys.registry.small import BETTER, GATE, evidence, promote, register, write_bundle

VERSIONS = 8


def stock(registry: Registry, folder: Path) -> Registry:
    """Eight versions: 2 was champion, 3 is canary, 4 shadow, 5 champion. Each has an online store, a download and what was compiled."""
    location = registry.location
    for number in range(1, VERSIONS + 1):
        manifest = write_bundle(folder / f"bundle{number}", auc=0.6 + number / 100, features=f"f{number}")
        assert register(registry, folder / f"bundle{number}") == number
        for where in (location.cache, location.compiled):
            (where / manifest.sha256 / "below").mkdir(parents=True)
            (where / manifest.sha256 / "below" / "file").write_bytes(bytes(number))
        store = location.online_store(manifest.feature_versions)
        store.parent.mkdir(exist_ok=True)
        connection = sqlite3.connect(store)
        connection.execute("CREATE TABLE log (x)")
        connection.close()
        store.with_name(f"{store.name}-wal").write_bytes(bytes(7))
    (location.cache / ".half.1234.tmp").mkdir()
    promote(registry, 2, None)
    promote(registry, 5, 2, BETTER)
    for version, state, percent in ((3, "canary", 5), (4, "shadow", None)):
        registry.validate("m", version, gates=(GATE,), evidence=evidence(BETTER), expected=5)
        registry.stage("m", version, state, percent=percent, reason="x")
    return registry


@pytest.fixture
def stocked(registry: Registry, tmp_path: Path) -> Registry:
    return stock(registry, tmp_path)


def kept(registry: Registry) -> list[int]:
    """The versions that MLflow still has."""
    return [int(record.version) for record in registry.versions("m")]


def files(location: Location) -> set[str]:
    """Everything below the registry's folders, but the runs' own files."""
    folders = (Path(location.artifacts), location.online, location.cache, location.compiled)
    found = {path.relative_to(location.online.parent).as_posix() for folder in folders for path in folder.rglob("*")}
    return {name for name in found if "/gates" not in name}


def test_an_alias_that_a_crash_left_behind_the_log_is_written_again(stocked: Registry) -> None:
    stocked._client.set_registered_model_alias("m", "champion", "2")
    list(collect(stocked, keep=VERSIONS, dry_run=True))
    with pytest.raises(RegistryError, match="the promotion log says 5"):
        stocked.resolve("models:/m@champion")
    list(collect(stocked, keep=VERSIONS))
    assert stocked.resolve("models:/m@champion")[1] == 5


def test_what_is_in_use_stays_with_all_that_it_needs(stocked: Registry) -> None:
    location, before = stocked.location, [event.id for event in stocked.log.events("m")]
    sha = {number: stocked.sha256("m", number) for number in kept(stocked)}
    gone = list(collect(stocked, 2))
    assert kept(stocked) == [2, 3, 4, 5, 7, 8], "previous, canary, shadow, champion, and the last two"
    assert all(verify(stocked.download("m", number)).sha256 == sha[number] for number in kept(stocked))
    stores = {location.online_store({"user": f"f{number}"}).name for number in kept(stocked)}
    assert {path.name for path in location.online.iterdir()} == stores | {f"{name}-wal" for name in stores}
    for folder in (location.cache, location.compiled):
        assert {path.name for path in folder.iterdir()} == {sha[number] for number in kept(stocked)}
    assert [g.name for g in gone if g.kind == "bundle"] == ["m/1", "m/6"]
    assert all(g.bytes > 1000 for g in gone if g.kind == "bundle")
    assert sorted(g.bytes for g in gone if g.kind == "compiled") == [1, 6]
    assert all(g.bytes > 7 for g in gone if g.kind == "online store")
    events = stocked.log.events("m")
    assert [event.id for event in events[: len(before)]] == before, "the log is kept"
    assert [(event.action, event.to_version) for event in events[len(before) :]] == [("remove", 1), ("remove", 6)]
    assert not [path for number in (1, 6) for path in Path(location.artifacts).rglob(sha[number])]
    assert list(collect(stocked, 2)) == [], "there is nothing left to do"


def test_a_rollback_is_possible_afterwards(stocked: Registry) -> None:
    list(collect(stocked, 1))
    event = stocked.rollback("m", reason="x")
    assert (event.to_version, stocked.download("m", 2).is_dir()) == (2, True)
    assert stocked.resolve("models:/m@champion")[1] == 2


def test_a_dry_run_tells_the_same_and_changes_nothing(stocked: Registry) -> None:
    location = stocked.location
    before, latest = files(location), stocked.log.latest_id("m")
    told = list(collect(stocked, 1, dry_run=True))
    assert (files(location), stocked.log.latest_id("m"), kept(stocked)) == (before, latest, list(range(1, VERSIONS + 1)))
    assert list(collect(stocked, 1)) == told


def test_what_was_removed_cannot_be_promoted(stocked: Registry) -> None:
    list(collect(stocked, 1))
    with pytest.raises(RegistryError, match="version 1 was removed by gc"):
        promote(stocked, 1, 5, BETTER)


def test_a_bundle_that_two_versions_share_stays_while_one_is_kept(registry: Registry, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    with start_run(registry.location.tracking_uri, registry.location.artifacts, "e", "r") as tracker:
        for _ in range(3):
            registry.register(tmp_path / "bundle", "m", tracker.run_id)
    assert [(g.name, g.bytes) for g in collect(registry, 1)] == [("m/1", 0), ("m/2", 0)]
    assert promote(registry, 3, None)[0].action == "promote"


def test_every_model_keeps_its_own(stocked: Registry, tmp_path: Path) -> None:
    write_bundle(tmp_path / "another", features="f1")
    register(stocked, tmp_path / "another", "other")
    list(collect(stocked, 1))
    assert len(stocked.versions("other")) == 1
    assert stocked.location.online_store({"user": "f1"}).is_file(), "the other model's bundle pins it"


def test_nothing_goes_while_a_kept_bundle_cannot_be_read(stocked: Registry) -> None:
    stored = stocked.download("m", 8)
    set_writable(stored, True)
    (stored / "manifest.json").unlink()
    before = files(stocked.location)
    with pytest.raises(RegistryError, match="no manifest to read"):
        list(collect(stocked, 1))
    assert files(stocked.location) == before


def test_a_log_that_goes_on_meanwhile_stops_it(stocked: Registry) -> None:
    course = collect(stocked, 1)
    assert next(course).name == "m/1"
    stocked.log.append("m", Entry("validate", 6, stocked.sha256("m", 6), "x"), actor="a")
    with pytest.raises(RegistryError, match="the log has gone on"):
        next(course)
    assert 6 in kept(stocked) and stocked.download("m", 6).joinpath("metrics.json").is_file()


def test_none_is_not_enough(stocked: Registry) -> None:
    with pytest.raises(RegistryError, match="keep: expected at least 1"):
        next(iter(collect(stocked, 0)))


# --- killed

KILLED = """
import json, os, signal, sys
from pathlib import Path
from recsys.registry import Location, Registry
from recsys.registry.collect import collect

registry, left = Registry(Location.under(Path(sys.argv[1]))), int(sys.argv[2])
registry.models()

def count(name, _):
    global left
    if name in ("os.remove", "os.rmdir", "os.chmod", "sqlite3.connect"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
list(collect(registry, 1))
versions = [int(record.version) for record in registry.versions("m")]
events = [[event.action, event.to_version] for event in registry.log.events("m")]
print(json.dumps({"operations": int(sys.argv[2]) - left, "versions": versions, "events": events}))
"""


def run(home: Path, last: int) -> dict[str, Any] | None:
    """`collect` in a process of its own, and what there is afterwards; None where it was killed, at its ``last`` operation on files.

    MLflow keeps connections to databases, so that no process may outlive the change of one.
    """
    done = subprocess.run([sys.executable, "-c", KILLED, str(home), str(last)], capture_output=True, text=True, timeout=120)
    if done.returncode == -signal.SIGKILL:
        return None
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"files": files(Location.under(home))}


@pytest.fixture
def restored(stocked: Registry, tmp_path: Path) -> Path:
    """A copy of the stocked home, to be put back in its place: artifacts are named by absolute paths."""
    return Path(shutil.copytree(stocked.location.online.parent, tmp_path / "copy"))


@pytest.mark.slow
def test_killed_anywhere_and_run_again_it_ends_the_same(stocked: Registry, restored: Path) -> None:
    home = stocked.location.online.parent
    expected = run(home, 10**9)
    operations = expected.pop("operations")
    assert operations > 30
    for last in range(1, operations, max(1, operations // 5)):
        remove(home)
        shutil.copytree(restored, home)
        assert run(home, last) is None
        again = run(home, 10**9)
        again.pop("operations")
        assert again == expected


def test_half_gone_files_are_taken_up(stocked: Registry) -> None:
    """In one process, as a killed run leaves them that had logged the removal and deleted a part."""
    location = stocked.location
    told = {garbage.name for garbage in collect(stocked, 1, dry_run=True)}
    stocked.log.append("m", Entry("remove", 1, stocked.sha256("m", 1), "x"), actor="a")
    set_writable(stocked.download("m", 1), True)
    remove(stocked.download("m", 1) / "ranker")
    store = location.online_store({"user": "f1"})
    remove(store.with_name(f"{store.name}-wal"))
    finished: list[Garbage] = list(collect(stocked, 1))
    assert {garbage.name for garbage in finished} == told
    assert kept(stocked) == [2, 3, 4, 5, 8]
    assert [event.to_version for event in stocked.log.events("m") if event.action == "remove"] == [1, 6, 7]
    assert len(list(location.cache.iterdir())) == 5
