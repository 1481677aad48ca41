# SPDX-License-Identifier: Apache-2.0
"""FS-5: however the data arrived, and whatever was interrupted, the store ends with the same content."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather
import pytest

from feature_store.definitions import FeatureRepo
from feature_store.materialize import append, materialize
from feature_store.offline import OfflineReader
from feature_store.online import FeatureStoreError, MemoryStore, OnlineReader, OnlineStore, SQLiteStore
from recsys.core.errors import ConfigError, DataError


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> OnlineStore:
    return MemoryStore() if request.param == "memory" else SQLiteStore(SQLiteStore.Config(path=tmp_path / "s.sqlite"))


def _digest(store: OnlineStore) -> str:
    with store.snapshot() as snapshot:
        return snapshot.digest()


def _whole(w: Any, tables: dict[str, pa.Table] | None = None) -> str:
    """The digest of everything materialised at once."""
    store = MemoryStore()
    materialize(w.repo, tables or w.tables, store)
    return _digest(store)


def _up_to(w: Any, seq: int) -> dict[str, pa.Table]:
    events = w.tables["interactions"]
    return dict(w.tables) | {"interactions": events.filter(pc.less(events.column("ingest_seq"), seq))}


@pytest.mark.parametrize("overlap", [0, 50])
def test_step_by_step_equals_at_once(world: Callable[..., Any], store: OnlineStore, overlap: int) -> None:
    w = world(1)
    reports = [materialize(w.repo, _up_to(w, seq), store, overlap=overlap) for seq in (0, 7, 150, 150, 399, 400)]
    assert _digest(store) == _whole(w)
    activity = [next(view for view in report.views if view.view == "activity") for report in reports]
    assert [view.full for view in activity] == [True, False, False, False, False, False]
    assert [view.watermark for view in activity] == [None, 6, 149, 149, 398, 399]
    users = w.tables["interactions"].filter(pc.is_valid(w.tables["interactions"].column("user_id"))).column("ingest_seq")
    fresh = [pc.sum(pc.and_(pc.greater(users, 398 - overlap), pc.less(users, 400))).as_py()]
    assert [activity[-1].events] == fresh
    assert [report.snapshot for report in reports] == [1, 2, 3, 4, 5, 6]


def test_again_changes_nothing(world: Callable[..., Any], store: OnlineStore) -> None:
    w = world(2)
    materialize(w.repo, w.tables, store)
    before = _digest(store)
    for full in (False, True):
        materialize(w.repo, w.tables, store, full=full)
        assert _digest(store) == before == _whole(w)


def test_a_row_committed_late_appears_within_the_overlap(world: Callable[..., Any], store: OnlineStore) -> None:
    """A writer took ``ingest_seq`` 390 but committed after 399 had been materialised."""
    w = world(3)
    events = w.tables["interactions"]
    without = events.filter(pc.not_equal(events.column("ingest_seq"), 390))
    materialize(w.repo, dict(w.tables) | {"interactions": without}, store)
    materialize(w.repo, w.tables, store, overlap=5)
    assert _digest(store) != _whole(w)
    materialize(w.repo, w.tables, store, overlap=20)
    assert _digest(store) == _whole(w)


def test_older_never_overwrites_newer(world: Callable[..., Any], store: OnlineStore) -> None:
    w = world(4)
    materialize(w.repo, w.tables, store)
    report = materialize(w.repo, _up_to(w, 100), store)
    assert _digest(store) == _whole(w)
    assert {view.watermark for view in report.views} == {None, 399}
    message = "view 'activity' cannot be written anew: table 'interactions' ends at ingest_seq 9., but the store has seen 39."
    with pytest.raises(DataError, match=message):
        materialize(w.repo, _up_to(w, 100), store, full=True)
    assert _digest(store) == _whole(w)


def test_an_event_keeps_its_first_content(world: Callable[..., Any], store: OnlineStore) -> None:
    w = world(5)
    events = w.tables["interactions"]
    materialize(w.repo, w.tables, store)
    changed = events.set_column(events.schema.get_field_index("rating"), "rating", pa.array([0.0] * events.num_rows))
    materialize(w.repo, dict(w.tables) | {"interactions": changed}, store)
    assert _digest(store) == _whole(w)


def test_static_rows_follow_their_table(world: Callable[..., Any], store: OnlineStore) -> None:
    w = world(6)
    materialize(w.repo, w.tables, store)
    users = w.tables["users"].slice(0, 3)
    users = users.set_column(1, "job", pa.array(["judge"] * 3))
    tables = dict(w.tables) | {"users": users}
    materialize(w.repo, tables, store)
    assert _digest(store) == _whole(w, tables)
    spine = w.spine("user", 30)
    assert OnlineReader(w.repo, store).read("user", spine).equals(OfflineReader(w.repo, tables).read("user", spine))


def test_a_changed_definition_is_written_anew_and_the_others_are_not(world: Callable[..., Any], store: OnlineStore) -> None:
    w = world(7)
    materialize(w.repo, w.tables, store)
    views = [{**view, "ttl": 51} if view["name"] == "recent" else view for view in w.definitions["views"]]
    other = FeatureRepo.model_validate({**w.definitions, "views": views})
    report = materialize(other, w.tables, store)
    assert {view.view: view.full for view in report.views} == {"profile": True, "activity": False, "recent": True, "popularity": False}


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 4])
def test_an_interruption_leaves_nothing_behind(
    world: Callable[..., Any], store: OnlineStore, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr("feature_store.materialize.BATCH_ENTITIES", 3)
    w = world(8)
    materialize(w.repo, _up_to(w, 200), store)
    before, calls = _digest(store), []

    def progress(view: str, written: int, total: int) -> None:
        calls.append((view, written, total))
        if len(calls) == after:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        materialize(w.repo, w.tables, store, progress=progress)
    assert _digest(store) == before
    assert calls[0] == ("profile", 3, 5)
    materialize(w.repo, w.tables, store)
    assert _digest(store) == _whole(w)


KILLED = """
import os, sys, pyarrow.feather
from pathlib import Path
from feature_store import materialize
from feature_store.definitions import FeatureRepo
from feature_store.online import SQLiteStore, sqlite

folder, point = Path(sys.argv[1]), sys.argv[2]
repo = FeatureRepo.model_validate_json((folder / "repo.json").read_text())
tables = {name: pyarrow.feather.read_table(folder / f"{name}.arrow") for name in ("interactions", "users")}

def die(*_):
    os._exit(9)

if point == "before commit":
    original = sqlite._SQLiteTransaction.set_state
    def set_state(self, view, state):
        original(self, view, state)
        if view == repo.views[-1].name:
            die()
    sqlite._SQLiteTransaction.set_state = set_state
progress = (lambda view, written, total: die() if view == "activity" else None) if point == "while writing" else None
materialize.materialize(repo, tables, SQLiteStore(SQLiteStore.Config(path=folder / "s.sqlite")), progress=progress)
"""


@pytest.mark.parametrize("point", ["while writing", "before commit"])
def test_a_killed_process_leaves_the_old_content(world: Callable[..., Any], tmp_path: Path, point: str) -> None:
    w = world(9)
    path = tmp_path / "s.sqlite"
    store = SQLiteStore(SQLiteStore.Config(path=path))
    materialize(w.repo, _up_to(w, 200), store)
    before = _digest(store)
    store.close()
    (tmp_path / "repo.json").write_text(w.repo.model_dump_json())
    for name, table in w.tables.items():
        pyarrow.feather.write_feather(table, str(tmp_path / f"{name}.arrow"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), point], env=environment, check=False).returncode == 9
    assert _digest(SQLiteStore.open(path)) == before
    store = SQLiteStore(SQLiteStore.Config(path=path))
    materialize(w.repo, w.tables, store)
    assert _digest(store) == _whole(w)


def test_appended_events_show_at_once_and_count_once_later(world: Callable[..., Any], store: OnlineStore) -> None:
    w = world(10)
    events, old = w.tables["interactions"], _up_to(w, 300)
    materialize(w.repo, old, store)
    fresh = events.filter(pc.greater_equal(events.column("ingest_seq"), 350))
    snapshot = append(w.repo, "events", fresh, store)
    assert snapshot == 2
    spine = w.spine("user", 60)
    seen = dict(w.tables) | {"interactions": pa.concat_tables([old["interactions"], fresh])}
    assert OnlineReader(w.repo, store).read("user", spine).equals(OfflineReader(w.repo, seen).read("user", spine))
    with store.snapshot() as content:
        assert content.states()["activity"].watermark == 299  # so that what lies between is not skipped
    materialize(w.repo, w.tables, store, overlap=0)
    assert _digest(store) == _whole(w)


def test_append_refuses(world: Callable[..., Any], store: OnlineStore) -> None:
    w = world(11)
    with pytest.raises(FeatureStoreError, match="view 'activity' is not in the online store"):
        append(w.repo, "events", w.tables["interactions"], store)
    with pytest.raises(ConfigError, match="source 'people' is static; only events can be appended"):
        append(w.repo, "people", w.tables["users"], store)
    with pytest.raises(ConfigError, match="unknown source 'event'; did you mean 'events'"):
        append(w.repo, "event", w.tables["interactions"], store)


def test_a_null_sequence_is_refused_also_when_incremental(world: Callable[..., Any], store: OnlineStore) -> None:
    w = world(12)
    materialize(w.repo, w.tables, store)
    before = _digest(store)
    events = w.tables["interactions"]
    broken = events.set_column(4, "ingest_seq", pa.array([None, *range(events.num_rows - 1)], pa.int64()))
    with pytest.raises(DataError, match="expected a value of 'ingest_seq' in every row, but 1 are null"):
        materialize(w.repo, dict(w.tables) | {"interactions": broken}, store)
    assert _digest(store) == before
