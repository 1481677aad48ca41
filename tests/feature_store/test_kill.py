# SPDX-License-Identifier: Apache-2.0
"""FS-5: whenever a materialising process is killed, readers are served the old content meanwhile, and the next run ends with the new."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather
import pytest

from feature_store.materialize import materialize
from feature_store.offline import OfflineReader
from feature_store.online import MemoryStore, OnlineReader, SQLiteStore

# Stops at one point, says so, and waits there for its end. Points: the number of a call of progress, and before and after the commit.
CHILD = """
import sys, pyarrow.feather
from pathlib import Path
from feature_store import materialize
from feature_store.definitions import FeatureRepo
from feature_store.online import SQLiteStore, sqlite

folder, point = Path(sys.argv[1]), sys.argv[2]
materialize.BATCH_ENTITIES = 3
repo = FeatureRepo.model_validate_json((folder / "repo.json").read_text())
tables = {name: pyarrow.feather.read_table(folder / f"{name}.arrow") for name in ("interactions", "users")}
calls = 0

def stop():
    print("stopped", flush=True)
    sys.stdin.read()

def progress(view, written, total):
    global calls
    calls += 1
    if str(calls) == point:
        stop()

original = sqlite._SQLiteTransaction.set_state
def set_state(self, view, state):
    original(self, view, state)
    if point == "before the commit" and view == repo.views[-1].name:
        stop()
sqlite._SQLiteTransaction.set_state = set_state
materialize.materialize(repo, tables, SQLiteStore(SQLiteStore.Config(path=folder / "s.sqlite")), progress=progress)
print(calls, flush=True)
if point == "after the commit":
    stop()
"""
CALLS = 11


@contextmanager
def _stopped(folder: Path, point: str) -> Iterator[subprocess.Popen[str]]:
    """A process that materialises and stands at ``point``; killed by the end at the latest."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", CHILD, str(folder), point]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            assert any(line == "stopped\n" for line in lines), "the process ended before the point"
            yield process
        finally:
            process.kill()


def _digest(store: Any) -> str:
    with store.snapshot() as snapshot:
        digest: str = snapshot.digest()
        return digest


def _prepare(w: Any, folder: Path) -> dict[str, pa.Table]:
    """The store with the first half of the events, and all of them in files; returns the tables of the first half."""
    events = w.tables["interactions"]
    half = dict(w.tables) | {"interactions": events.filter(pc.less(events.column("ingest_seq"), 200))}
    store = SQLiteStore(SQLiteStore.Config(path=folder / "s.sqlite"))
    materialize(w.repo, half, store)
    store.close()
    (folder / "repo.json").write_text(w.repo.model_dump_json())
    for name, table in w.tables.items():
        pyarrow.feather.write_feather(table, str(folder / f"{name}.arrow"))
    return half


def _kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize("point", ["1", "4", str(CALLS), "before the commit", "after the commit"])
def test_killed_anywhere_and_run_again_ends_the_same(world: Callable[..., Any], tmp_path: Path, point: str) -> None:
    w = world(0)
    half = _prepare(w, tmp_path)
    spine, path = w.spine("user", 40), tmp_path / "s.sqlite"
    shown = w.tables if point == "after the commit" else half
    expected = OfflineReader(w.repo, shown).read("user", spine)
    reader = OnlineReader(w.repo, SQLiteStore.open(path))
    with _stopped(tmp_path, point) as process:
        assert reader.read("user", spine).equals(expected)  # while the writer stands in the middle of its transaction
        _kill(process)
    assert reader.read("user", spine).equals(expected)
    whole = MemoryStore()
    materialize(w.repo, w.tables, whole)
    store = SQLiteStore(SQLiteStore.Config(path=path))
    materialize(w.repo, w.tables, store)
    assert _digest(store) == _digest(whole)
    assert reader.read("user", spine).equals(OfflineReader(w.repo, w.tables).read("user", spine))


def test_killed_again_and_again(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(1)
    half = _prepare(w, tmp_path)
    before = MemoryStore()
    materialize(w.repo, half, before)
    for point in ("2", "7"):
        with _stopped(tmp_path, point) as process:
            _kill(process)
        assert _digest(SQLiteStore.open(tmp_path / "s.sqlite")) == _digest(before)
    whole, store = MemoryStore(), SQLiteStore(SQLiteStore.Config(path=tmp_path / "s.sqlite"))
    materialize(w.repo, w.tables, whole)
    materialize(w.repo, w.tables, store)
    assert _digest(store) == _digest(whole)
