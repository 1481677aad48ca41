# SPDX-License-Identifier: Apache-2.0
"""A user goes from online stores and served logs, everybody else stays, and materialising again brings nobody back."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from feature_store.audit import audit
from feature_store.definitions import FeatureRepo
from feature_store.forget import forget_online, forget_served
from feature_store.materialize import append, materialize
from feature_store.offline import OfflineReader
from feature_store.online import MemoryStore, OnlineReader, OnlineStore, SQLiteStore
from feature_store.served import ServedLog
from recsys.core.errors import DataError
from recsys.core.tombstones import Tombstones

USER = "ü6"


def definitions(w: Any) -> FeatureRepo:
    """Those of the world, without a feature that lists users."""
    content = copy.deepcopy(w.definitions)
    popularity = content["views"][3]
    popularity["features"] = [feature for feature in popularity["features"] if feature["name"] != "item_users"]
    return FeatureRepo.model_validate(content)


def without(w: Any) -> dict[str, pa.Table]:
    """The tables as if the user had never been there."""
    return {name: table.filter(pc.fill_null(pc.not_equal(table.column("user_id"), USER), True)) for name, table in w.tables.items()}


def digest(store: OnlineStore) -> str:
    with store.snapshot() as snapshot:
        return snapshot.digest()


def test_the_user_is_as_one_who_never_came(world: Callable[..., Any], tmp_path: Path) -> None:
    w, store = world(0), SQLiteStore(SQLiteStore.Config(path=tmp_path / "s.sqlite"))
    repo = definitions(w)
    materialize(repo, w.tables, store)
    spine = w.spine("user", 200)
    others = spine.filter(pc.fill_null(pc.not_equal(spine.column("user_id"), USER), True))
    reader = OnlineReader(repo, store)
    before, items = reader.read("user", others), reader.read("item", w.spine("item", 50))
    found = forget_online(store, [repo], "user_id", USER, what="store")
    assert found.views == ("activity", "profile", "recent") and found.keep == ()
    assert reader.read("user", others).equals(before)
    assert reader.read("user", spine).equals(OfflineReader(repo, without(w)).read("user", spine))
    assert forget_online(store, [repo], "user_id", USER, what="store").views == ()
    assert items.num_rows == 55  # of items nothing went: their counts are nobody's


def test_an_item_of_the_same_id_stays(world: Callable[..., Any]) -> None:
    w, store = world(1), MemoryStore()
    repo = definitions(w)
    events = w.tables["interactions"]
    both = pc.if_else(pc.equal(events.column("item_id"), "i3"), USER, events.column("item_id"))
    materialize(repo, w.tables | {"interactions": events.set_column(1, "item_id", both)}, store)
    forget_online(store, [repo], "user_id", USER, what="store")
    with store.snapshot() as snapshot:
        assert USER in dict(snapshot.scan("popularity")) and USER not in dict(snapshot.scan("activity"))


def test_a_view_of_items_that_lists_users_is_named(world: Callable[..., Any]) -> None:
    w, store = world(0), MemoryStore()
    materialize(w.repo, w.tables, store)
    assert forget_online(store, [w.repo], "user_id", USER, what="store").keep == ("popularity",)
    with pytest.raises(DataError, match="store: no known definition explains view"):
        forget_online(store, [], "user_id", USER, what="store")


@pytest.mark.parametrize("full", [False, True])
def test_a_tombstone_keeps_the_user_away(world: Callable[..., Any], tmp_path: Path, full: bool) -> None:
    """The tables still hold the user, and new events of the user come."""
    w, store, stones = world(2, late=0.0), MemoryStore(), Tombstones.under(tmp_path)
    repo = definitions(w)
    events = w.tables["interactions"]
    half = w.tables | {"interactions": events.filter(pc.less(events.column("ingest_seq"), 200))}
    materialize(repo, half, store)
    stones.add(USER)
    forget_online(store, [repo], "user_id", USER, what="store")
    materialize(repo, w.tables, store, full=full, forgotten=stones)
    append(repo, "events", events.slice(0, 50), store, forgotten=stones)
    with store.snapshot() as snapshot:
        assert all(USER not in dict(snapshot.scan(view)) for view in ("activity", "profile", "recent"))
    spine = w.spine("user", 100)
    assert OnlineReader(repo, store).read("user", spine).equals(OfflineReader(repo, without(w)).read("user", spine))
    if full:
        never = MemoryStore()
        materialize(repo, without(w), never)
        with store.snapshot() as one, never.snapshot() as other:
            assert all(dict(one.scan(view)) == dict(other.scan(view)) for view in one.states())
    materialize(repo, w.tables, store, full=full)  # without them the user is back: it is they who keep the user away
    with store.snapshot() as snapshot:
        assert USER in dict(snapshot.scan("activity"))


def test_a_full_materialisation_without_the_last_event_is_no_shorter_table(world: Callable[..., Any], tmp_path: Path) -> None:
    w, store, stones = world(3, late=0.0), MemoryStore(), Tombstones.under(tmp_path)
    repo, events = definitions(w), w.tables["interactions"]
    last = pc.equal(events.column("ingest_seq"), pc.max(events.column("ingest_seq")))
    tables = w.tables | {"interactions": events.set_column(0, "user_id", pc.if_else(last, USER, events.column("user_id")))}
    materialize(repo, tables, store)
    stones.add(USER)
    materialize(repo, tables, store, full=True, forgotten=stones)
    with store.snapshot() as snapshot:
        assert snapshot.states()["activity"].watermark == events.num_rows - 1


def test_a_served_log_without_the_user(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(4)
    reader = OfflineReader(w.repo, w.tables)
    log = ServedLog(tmp_path, w.repo, share=1.0, flush_rows=100)
    users, items = reader.read("user", w.spine("user", 300)), reader.read("item", w.spine("item", 40))
    for first in range(0, users.num_rows, 60):
        log.offer("user", users.slice(first, 60))
    log.offer("item", items)
    log.close()
    (tmp_path / ".part-1.parquet.7.tmp").write_bytes(b"half")  # of a writer that is at work, for all that is known
    before = {path.name: pq.read_table(path) for path in tmp_path.glob("part*")}
    rows = sum(table.filter(pc.equal(table.column("entity"), USER)).num_rows for table in before.values())
    assert rows > 0 and forget_served(tmp_path, [w.repo], "user_id", USER) == rows
    for path in tmp_path.glob("part*"):
        expected = before[path.name].filter(pc.not_equal(before[path.name].column("entity"), USER))
        found = pq.read_table(path)
        assert found.equals(expected) and found.schema.metadata == before[path.name].schema.metadata
    assert forget_served(tmp_path, [w.repo], "user_id", USER) == 0
    assert audit(w.repo, w.tables, tmp_path).alarms == ()
    with pytest.raises(DataError, match="no known definition explains service 'user' of version"):
        forget_served(tmp_path, [], "user_id", "u1")
