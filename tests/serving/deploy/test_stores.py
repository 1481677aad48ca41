# SPDX-License-Identifier: Apache-2.0
"""Copies of online stores hold what was committed, and take the place of what was there."""

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from feature_store.online import SQLiteStore
from feature_store.online.base import ViewState
from recsys.core.errors import DataError
from recsys.core.tombstones import Tombstones
from recsys.registry.location import TRACKING_URI, Location
from serving.app import create_app
from serving.deploy import stores
from serving.engine import Engine, RegistrySource
from tests.serving.support import settings, wait_until

NAME = "0123456789abcdef.sqlite"


def store_of(home: Path) -> SQLiteStore:
    return SQLiteStore(SQLiteStore.Config(path=Location.under(home).online / NAME))


def write(store: SQLiteStore, watermark: int, values: dict[str, bytes]) -> str:
    with store.transaction() as transaction:
        transaction.write("view", values)
        transaction.set_state("view", ViewState("v", watermark))
    return digest(store)


def digest(store: SQLiteStore) -> str:
    with store.snapshot() as snapshot:
        return snapshot.digest()


def fetched(home: Path, shared: Path) -> str:
    assert stores.fetch(home, shared) == [NAME]
    store = SQLiteStore.open(Location.under(home).online / NAME)
    try:
        return digest(store)
    finally:
        store.close()


def test_what_was_committed_arrives_although_the_writer_goes_on(tmp_path: Path) -> None:
    batch, shared = tmp_path / "batch", tmp_path / "shared"
    store = store_of(batch)
    first = write(store, 1, {"user": b"one"})
    assert Path(f"{store.config.path}-wal").stat().st_size > 0, "the file alone does not hold it"
    with store.transaction() as transaction:
        transaction.write("view", {"user": b"not committed yet"})
        assert stores.publish(batch, shared) == [NAME]
    assert fetched(tmp_path / "pod", shared) == first
    assert sorted(path.name for path in shared.iterdir()) == [NAME], "nothing but whole stores"
    assert sorted(path.name for path in batch.iterdir()) == ["online"]
    assert sqlite3.connect(shared / NAME).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.close()


def test_a_second_copy_replaces_the_first_and_what_stood_beside_it(tmp_path: Path) -> None:
    batch, shared, pod = tmp_path / "batch", tmp_path / "shared", tmp_path / "pod"
    store = store_of(batch)
    write(store, 1, {"user": b"one", "gone": b"x"})
    stores.publish(batch, shared)
    fetched(pod, shared)
    # A server that wrote into its copy and was killed leaves a log that belongs to the old file.
    own = store_of(pod)
    write(own, 9, {"user": b"of the pod"})
    left = {name: Path(f"{own.config.path}{name}").read_bytes() for name in ("-wal", "-shm")}
    own.close()
    for name, content in left.items():
        Path(f"{own.config.path}{name}").write_bytes(content)
    with store.transaction() as transaction:
        transaction.clear("view")
    second = write(store, 2, {"user": b"two"})
    stores.publish(batch, shared)
    store.close()
    assert fetched(pod, shared) == second


def test_a_server_with_nothing_but_a_copy_and_the_registrys_address_answers_as_one_at_home(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a pod does: its home is empty, the registry is elsewhere."""
    asked = {"inputs": [{"user_id": "3", "k": 4, "request_time": "2030-01-01T00:00:00Z"}]}

    def answer(home: Path) -> Any:
        engine = Engine(RegistrySource("models:/recsys@champion", Location.under(home)), settings())
        with TestClient(create_app(engine, engine.settings)) as client:
            wait_until(lambda: client.get("/readyz").status_code == 200)
            return client.post("/invocations", json=asked).json()["predictions"]

    expected = answer(tiny_run.home)
    monkeypatch.setenv(TRACKING_URI, Location.under(tiny_run.home).tracking_uri)
    stores.publish(tiny_run.home, tmp_path / "shared")
    stores.fetch(tmp_path / "pod", tmp_path / "shared")
    assert answer(tmp_path / "pod") == expected and len(expected[0]["item_ids"]) == 4
    assert not (tmp_path / "pod" / "mlflow.db").exists()


def test_whoever_was_forgotten_stays_forgotten(tmp_path: Path) -> None:
    batch, shared = tmp_path / "batch", tmp_path / "shared"
    store_of(batch).close()
    Tombstones.under(batch).add("ana")
    stores.publish(batch, shared)
    stores.fetch(tmp_path / "pod", shared)
    assert "ana" in Tombstones.under(tmp_path / "pod") and "bo" not in Tombstones.under(tmp_path / "pod")


def test_where_there_is_nothing_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="expected online stores"):
        stores.publish(tmp_path, tmp_path / "shared")
    assert stores.main(["fetch", "--from", str(tmp_path / "shared"), "--home", str(tmp_path)]) == 2
    assert "materialise and publish the features first" in capsys.readouterr().err


def test_a_damaged_store_is_named_and_the_copy_before_it_stays(tmp_path: Path) -> None:
    batch, shared = tmp_path / "batch", tmp_path / "shared"
    store = store_of(batch)
    first = write(store, 1, {"user": b"one"})
    stores.publish(batch, shared)
    store.close()
    path = Location.under(batch).online / NAME
    shutil.copyfile(__file__, path)
    with pytest.raises(DataError, match=f"{NAME}: cannot be copied"):
        stores.publish(batch, shared)
    assert fetched(tmp_path / "pod", shared) == first


def test_the_command_does_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store_of(tmp_path / "batch").close()
    assert stores.main(["publish", "--to", str(tmp_path / "shared"), "--home", str(tmp_path / "batch")]) == 0
    assert stores.main(["fetch", "--from", str(tmp_path / "shared"), "--home", str(tmp_path / "pod")]) == 0
    assert capsys.readouterr().out.splitlines() == [f"publish: {NAME}", f"fetch: {NAME}"]
