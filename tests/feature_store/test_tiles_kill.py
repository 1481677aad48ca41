# SPDX-License-Identifier: Apache-2.0
"""FS-5 for tiles: a process that materialises is killed at any step, and the next run ends with the content that one run makes."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather
import pytest

from feature_store.materialize import materialize
from feature_store.offline import OfflineReader
from feature_store.online import MemoryStore, OnlineReader, OnlineStore, SQLiteStore
from tests.feature_store.test_tiles import after, same
from tests.feature_store.tiled_world import repo

CHILD = """
import os, signal, sys, pyarrow.feather
from pathlib import Path
from feature_store import materialize
from feature_store.counted import Counted
from feature_store.definitions import FeatureRepo
from feature_store.online import SQLiteStore

folder, point = Path(sys.argv[1]), sys.argv[2]
materialize.BATCH_ENTITIES = 3
calls = 0

def step(*_):
    global calls
    calls += 1
    if str(calls) == point:
        os.kill(os.getpid(), signal.SIGKILL)

original = Counted.add
def add(self, *given):
    step()
    original(self, *given)
    step()
Counted.add = add
repo = FeatureRepo.model_validate_json((folder / "repo.json").read_text())
tables = {name: pyarrow.feather.read_table(folder / f"{name}.arrow") for name in ("interactions", "users")}
materialize.materialize(repo, tables, SQLiteStore(SQLiteStore.Config(path=folder / "s.sqlite")), progress=step)
print(calls, flush=True)
"""


def digest(store: OnlineStore) -> str:
    with store.snapshot() as snapshot:
        return snapshot.digest()


def run(folder: Path, point: int) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", CHILD, str(folder), str(point)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout


@pytest.mark.parametrize("point", [1, 9, 15, 18, 22])
def test_killed_at_any_step_and_run_again_ends_the_same(world: Callable[..., Any], tmp_path: Path, point: int) -> None:
    w, path = world(0, late=0.4), tmp_path / "s.sqlite"
    events = w.tables["interactions"]
    half = dict(w.tables) | {"interactions": events.filter(pc.less(events.column("ingest_seq"), 200))}
    store = SQLiteStore(SQLiteStore.Config(path=path))
    materialize(repo(), half, store)
    before = digest(store)
    store.close()
    (tmp_path / "repo.json").write_text(repo().model_dump_json())
    for name, table in w.tables.items():
        pyarrow.feather.write_feather(table, str(tmp_path / f"{name}.arrow"))
    assert run(tmp_path, point)[0] == -signal.SIGKILL
    assert digest(SQLiteStore.open(path)) == before
    status, calls = run(tmp_path, -1)
    assert status == 0 and int(calls) >= 22
    whole = MemoryStore()
    materialize(repo(), w.tables, whole)
    store = SQLiteStore(SQLiteStore.Config(path=path))
    assert digest(store) == digest(whole)
    spine: pa.Table = after(w, "user", 100)
    same(OnlineReader(repo(), store).read("user", spine), OfflineReader(repo(), w.tables).read("user", spine))
