# SPDX-License-Identifier: Apache-2.0
"""FS-1: the same values online as offline, from one snapshot, in one round trip per view."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from feature_store.definitions import FeatureRepo
from feature_store.materialize import materialize
from feature_store.offline import OfflineReader
from feature_store.online import FeatureStoreError, MemoryStore, OnlineReader, OnlineStore, Snapshot, SQLiteStore
from recsys.core.errors import ConfigError, SchemaError


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> OnlineStore:
    return MemoryStore() if request.param == "memory" else SQLiteStore(SQLiteStore.Config(path=tmp_path / "s.sqlite"))


@pytest.mark.parametrize(("seed", "late"), [(0, 0.0), (1, 0.3)])
def test_offline_equals_online(world: Callable[..., Any], store: OnlineStore, seed: int, late: float) -> None:
    """10,000 random pairs of key and time for each store, integers and floats equal to the last bit."""
    w = world(seed, count=1200, late=late)
    materialize(w.repo, w.tables, store)
    for service in ("user", "item"):
        spine = w.spine(service, 2500)
        offline = OfflineReader(w.repo, w.tables).read(service, spine)
        online = OnlineReader(w.repo, store).read(service, spine)
        assert online.schema.equals(offline.schema)
        for name in offline.column_names:
            assert online.column(name).equals(offline.column(name)), name


def test_one_row_at_a_time_equals_many(world: Callable[..., Any]) -> None:
    w = world(2)
    store = MemoryStore()
    materialize(w.repo, w.tables, store)
    reader, spine = OnlineReader(w.repo, store), w.spine("user", 25)
    together = reader.read("user", spine)
    assert pa.concat_tables([reader.read("user", spine.slice(row, 1)) for row in range(spine.num_rows)]).equals(together)


def test_empty_store_and_empty_spine(world: Callable[..., Any], store: OnlineStore) -> None:
    w = world(3)
    tables = {name: table.slice(0, 0) for name, table in w.tables.items()}
    materialize(w.repo, tables, store)
    spine = w.spine("user", 20)
    reader = OnlineReader(w.repo, store)
    assert reader.read("user", spine).equals(OfflineReader(w.repo, tables).read("user", spine))
    assert reader.read("user", spine.slice(0, 0)).num_rows == 0


class _Counting(MemoryStore):
    """A memory store that writes down what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[dict[str, int]] = []
        self.snapshots = 0

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        with super().snapshot() as snapshot:
            self.snapshots += 1
            original = snapshot.multi_get

            def multi_get(wanted: Mapping[str, Sequence[str]]) -> dict[str, list[bytes | None]]:
                self.asked.append({view: len(entities) for view, entities in wanted.items()})
                return original(wanted)

            snapshot.multi_get = multi_get  # type: ignore[method-assign]
            yield snapshot


def test_one_round_trip_for_all_views_of_an_entity(world: Callable[..., Any]) -> None:
    w = world(4)
    store = _Counting()
    materialize(w.repo, w.tables, store)
    spine = w.spine("user", 300)
    OnlineReader(w.repo, store).read("user", spine)
    users = len(set(spine.column("user_id").to_pylist()) - {None})
    assert store.asked == [{"profile": users, "activity": users, "recent": users}]
    assert store.snapshots == 1


def test_other_versions_are_refused(world: Callable[..., Any], store: OnlineStore) -> None:
    w = world(5)
    spine = w.spine("user", 3)
    with pytest.raises(FeatureStoreError, match="view 'profile' is not in the online store; materialise it first"):
        OnlineReader(w.repo, store).read("user", spine)
    materialize(w.repo, w.tables, store)
    views = [{**view, "ttl": 51} if view["name"] == "recent" else view for view in w.definitions["views"]]
    other = FeatureRepo.model_validate({**w.definitions, "views": views})
    held, wanted = w.repo.view_version("recent")[:12], other.view_version("recent")[:12]
    message = f"view 'recent': the online store holds version {held}, but its definition is version {wanted}; materialise it again"
    with pytest.raises(FeatureStoreError, match=message):
        OnlineReader(other, store).read("user", spine)
    OnlineReader(other, store).read("item", w.spine("item", 3))  # whose view did not change
    materialize(other, w.tables, store)
    assert OnlineReader(other, store).read("user", spine).equals(OfflineReader(other, w.tables).read("user", spine))


def test_errors(world: Callable[..., Any], store: OnlineStore) -> None:
    w = world(6)
    materialize(w.repo, w.tables, store)
    reader, spine = OnlineReader(w.repo, store), w.spine("user", 3)
    with pytest.raises(ConfigError, match="unknown feature service 'users'; did you mean 'user'"):
        reader.read("users", spine)
    with pytest.raises(SchemaError, match="spine: missing column: unknown column 'user_id'"):
        reader.read("user", w.spine("item", 3))
    with store.transaction() as transaction:
        transaction.write("recent", {"u1": b"damaged"})
    with pytest.raises(FeatureStoreError, match="a stored value does not hold the columns event_time, "):
        reader.read("user", pa.table({"user_id": ["u1"], "request_time": [w.at(500)]}))


def test_a_reader_beside_materialisation_sees_old_or_new_never_both(world: Callable[..., Any], store: OnlineStore) -> None:
    """FS-6: the three views of a service change together, and reads go on meanwhile."""
    w = world(7)
    ends = [100, 200, 300, 400]
    seq = w.tables["interactions"].column("ingest_seq")
    versions = [w.tables | {"interactions": w.tables["interactions"].filter(pa.compute.less(seq, end))} for end in ends]
    spine = w.spine("user", 40)
    allowed = [OfflineReader(w.repo, tables).read("user", spine) for tables in versions]
    materialize(w.repo, versions[0], store)
    reader, seen, stop = OnlineReader(w.repo, store), [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(reader.read("user", spine))

    threads = [threading.Thread(target=read) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    for thread in threads:
        thread.start()
    try:
        for tables in versions[1:]:
            materialize(w.repo, tables, store, full=True)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    kinds = [next((place for place, table in enumerate(allowed) if result.equals(table)), None) for result in seen]
    assert seen and None not in kinds
    assert OnlineReader(w.repo, store).read("user", spine).equals(allowed[-1])
