# SPDX-License-Identifier: Apache-2.0
"""What every registered online store must do, and what a file may do to the embedded one."""

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from feature_store.online import FeatureStoreError, MemoryStore, OnlineStore, SQLiteStore, ViewState
from recsys.core.components import names

NAMES = names("online_store")


def _fill(store: OnlineStore, **values: bytes) -> None:
    with store.transaction() as transaction:
        transaction.write("v", values)
        transaction.set_state("v", ViewState("1", 7))


def _all(store: OnlineStore, view: str = "v") -> dict[str, bytes]:
    with store.snapshot() as snapshot:
        return dict(snapshot.scan(view))


def test_the_shipped_stores_are_registered() -> None:
    assert {"memory", "sqlite", "redis"} <= set(NAMES)


def test_multi_get_keeps_order_and_answers_none(store: OnlineStore) -> None:
    odd = {"": b"", "a\0b": b"nul", "ü'\"\\ %": b"\x00\xff", "🙂": b"x" * 100_000}
    with store.transaction() as transaction:
        transaction.write("v", odd)
        transaction.write("other", {"a": b"other"})
    with store.snapshot() as snapshot:
        assert snapshot.multi_get({"v": ["🙂", "a", "", "ü'\"\\ %", "", "a\0b"]})["v"] == [
            b"x" * 100_000,
            None,
            b"",
            b"\x00\xff",
            b"",
            b"nul",
        ]
        assert snapshot.multi_get({"v": []})["v"] == []
        assert snapshot.multi_get({"no such view": ["a"]})["no such view"] == [None]
        many = [str(i) for i in range(50_000)]
        assert snapshot.multi_get({"other": [*many, "a"]})["other"] == [None] * 50_000 + [b"other"]


def test_a_snapshot_shows_no_later_write(store: OnlineStore) -> None:
    _fill(store, a=b"old", gone=b"old")
    with store.snapshot() as before:
        assert before.id == 1
        with store.transaction() as transaction:
            transaction.clear("v")
            transaction.write("v", {"a": b"new"})
            transaction.set_state("v", ViewState("2", None))
        assert before.multi_get({"v": ["a", "gone"]})["v"] == [b"old", b"old"]
        assert before.states() == {"v": ViewState("1", 7)}
        with store.snapshot() as after:
            assert after.multi_get({"v": ["a", "gone"]})["v"] == [b"new", None]
            assert after.states() == {"v": ViewState("2", None)}
            assert after.id == before.id + 1 == 2


def test_a_transaction_reads_its_own_writes_and_nobody_else_does(store: OnlineStore) -> None:
    _fill(store, a=b"1")
    with store.transaction() as transaction:
        transaction.write("v", {"a": b"2", "b": b"2"})
        transaction.set_state("w", ViewState("x", None))
        assert transaction.multi_get({"v": ["b", "a"]})["v"] == [b"2", b"2"]
        assert set(transaction.states()) == {"v", "w"}
        assert _all(store) == {"a": b"1"}
    assert _all(store) == {"a": b"2", "b": b"2"}


def test_an_error_undoes_everything(store: OnlineStore) -> None:
    _fill(store, a=b"1")
    with store.snapshot() as snapshot:
        digest = snapshot.digest()
    with pytest.raises(KeyError), store.transaction() as transaction:
        transaction.clear("v")
        transaction.write("v", {"z": b"z"})
        raise KeyError
    with store.snapshot() as snapshot:
        assert snapshot.digest() == digest
        assert snapshot.id == 1
    _fill(store, b=b"2")  # and the store goes on
    assert _all(store) == {"a": b"1", "b": b"2"}


def test_clear_takes_one_view(store: OnlineStore) -> None:
    with store.transaction() as transaction:
        for view in ("v", "w"):
            transaction.write(view, {"a": b"1"})
            transaction.set_state(view, ViewState("1", 1))
    with store.transaction() as transaction:
        transaction.clear("v")
    assert (_all(store, "v"), _all(store, "w")) == ({}, {"a": b"1"})
    with store.snapshot() as snapshot:
        assert set(snapshot.states()) == {"w"}


def test_scan_is_sorted_and_the_digest_is_of_content(store: OnlineStore) -> None:
    _fill(store, b=b"1", a=b"2", **{"ü": b"3", "Z": b"4"})
    _fill(store, c=b"5")
    reference = MemoryStore()
    _fill(reference, Z=b"4", **{"ü": b"3"}, c=b"5", a=b"2", b=b"1")
    with store.snapshot() as snapshot, reference.snapshot() as other:
        assert [entity for entity, _ in snapshot.scan("v")] == ["Z", "a", "b", "c", "ü"]
        assert snapshot.digest() == other.digest()
    digests = {other.digest()}
    for change in ({"a": b"3"}, {"d": b""}, {"ca": b"5"}):
        _fill(reference, **change)
        with reference.snapshot() as changed:
            digests.add(changed.digest())
    with reference.transaction() as transaction:
        transaction.set_state("v", ViewState("1", 8))
    with reference.snapshot() as changed:
        assert len(digests | {changed.digest()}) == 5


def test_readers_see_whole_transactions_while_writers_take_turns(store: OnlineStore) -> None:
    keys = [str(i) for i in range(30)]
    problems: list[object] = []
    _fill(store, **dict.fromkeys(keys, b"0"))
    stop = threading.Event()

    def write() -> None:
        for _ in range(25):
            with store.transaction() as transaction:
                number = int(transaction.multi_get({"v": keys[:1]})["v"][0] or b"") + 1
                for key in keys:
                    transaction.write("v", {key: b"%d" % number})

    def read() -> None:
        while not stop.is_set():
            with store.snapshot() as snapshot:
                halves = snapshot.multi_get({"v": keys[:15]})["v"], snapshot.multi_get({"v": keys[15:]})["v"]
            if len({*halves[0], *halves[1]}) != 1:
                problems.append(halves)

    readers, writers = [threading.Thread(target=read) for _ in range(2)], [threading.Thread(target=write) for _ in range(2)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not problems
    assert _all(store) == dict.fromkeys(keys, b"50")


def test_a_forgotten_entity_is_as_one_that_never_was(store: OnlineStore) -> None:
    odd = "ü'\":*%"
    reference = MemoryStore()
    for each in (store, reference):
        with each.transaction() as transaction:
            for view in ("v", "w", "items"):
                transaction.write(view, {"a": b"1", "b": b"2"} | ({} if each is reference and view != "items" else {odd: b"gone"}))
                transaction.set_state(view, ViewState("1", 7))
    with store.snapshot() as before:
        number = before.id
    assert store.forget(["v", "w", "no such view"], odd) == ("v", "w")
    with store.snapshot() as snapshot, reference.snapshot() as other:
        assert snapshot.digest() == other.digest() and snapshot.id == number + 1
        assert snapshot.multi_get({"v": [odd, "a"], "items": [odd]}) == {"v": [None, b"1"], "items": [b"gone"]}
        assert [entity for entity, _ in snapshot.scan("v")] == ["a", "b"]
    assert store.forget(["v", "w"], odd) == ()
    with store.snapshot() as snapshot:
        assert snapshot.id == number + 1
    _fill(store, **{odd: b"new"})  # and the store goes on
    assert _all(store)[odd] == b"new"


def test_forgetting_in_an_empty_store(store: OnlineStore) -> None:
    assert store.forget(["v"], "a") == ()
    _fill(store, a=b"1")
    assert _all(store) == {"a": b"1"}


def test_sqlite_keeps_no_byte_of_whom_it_forgot(tmp_path: Path) -> None:
    path, secret = tmp_path / "s.sqlite", b"never-to-be-found"
    store = SQLiteStore(SQLiteStore.Config(path=path))
    reader = SQLiteStore.open(path)
    for size in (10, 3000, 200, 30_000):  # values that grew left their old bytes in free pages
        _fill(store, **{secret.decode(): secret * size, "b": b"x" * 5000, "c": b"y" * size})
    _fill(store, **{str(n): b"z" * 100 for n in range(2000)})
    assert _all(reader)["b"] == b"x" * 5000
    bytes_of = lambda: b"".join(file.read_bytes() for file in sorted(tmp_path.iterdir()))  # noqa: E731
    assert secret in bytes_of()
    assert store.forget(["v"], secret.decode()) == ("v",)
    assert secret not in bytes_of() and {file.name for file in tmp_path.iterdir()} <= {"s.sqlite", "s.sqlite-wal", "s.sqlite-shm"}
    assert len(_all(reader)) == 2002 and _all(reader)["b"] == b"x" * 5000


def test_sqlite_that_died_after_its_commit_forgets_the_bytes_next_time(tmp_path: Path) -> None:
    path, secret = tmp_path / "s.sqlite", b"never-to-be-found"
    store = SQLiteStore(SQLiteStore.Config(path=path))
    _fill(store, **{secret.decode(): secret * 3000, "b": b"x"})
    store.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA secure_delete = OFF")
    connection.execute("DELETE FROM log WHERE entity = ?", (secret.decode(),))
    connection.commit()
    connection.close()
    assert secret in path.read_bytes()
    assert SQLiteStore(SQLiteStore.Config(path=path)).forget(["v"], secret.decode()) == ()
    assert secret not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_sqlite_says_that_a_snapshot_is_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_store.online.sqlite.BUSY_SECONDS", 0.05)
    store = SQLiteStore(SQLiteStore.Config(path=tmp_path / "s"))
    _fill(store, a=b"1", b=b"2")
    with store.snapshot() as snapshot, pytest.raises(FeatureStoreError, match="a snapshot is still read from; forget again"):
        snapshot.states()
        store.forget(["v"], "a")
    assert store.forget(["v"], "a") == () and _all(store) == {"b": b"2"}
    with pytest.raises(FeatureStoreError, match="was opened for reading only"):
        SQLiteStore.open(tmp_path / "s").forget(["v"], "a")


def test_sqlite_read_only(tmp_path: Path) -> None:
    path = tmp_path / "a store.sqlite"
    with pytest.raises(FeatureStoreError, match=r"a store\.sqlite: no such file; materialise the features first"):
        SQLiteStore.open(path)
    writer = SQLiteStore(SQLiteStore.Config(path=path))
    _fill(writer, a=b"1")
    reader = SQLiteStore.open(path)
    assert _all(reader) == {"a": b"1"}
    with pytest.raises(FeatureStoreError, match="was opened for reading only"), reader.transaction():
        pass
    _fill(writer, a=b"2")
    writer.close()
    assert _all(reader) == {"a": b"2"}
    reader.close()
    assert _all(SQLiteStore.open(path)) == {"a": b"2"}


def test_sqlite_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    path.write_bytes(b"not a database" * 100)
    for read_only in (False, True):
        with pytest.raises(FeatureStoreError, match=r"x\.sqlite: file is not a database"):
            SQLiteStore(SQLiteStore.Config(path=path, read_only=read_only))
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 9")
    connection.commit()
    with pytest.raises(FeatureStoreError, match="expected format 1, got 9"):
        SQLiteStore(SQLiteStore.Config(path=path))


def test_sqlite_says_when_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_store.online.sqlite.BUSY_SECONDS", 0.05)
    make: Callable[[], SQLiteStore] = lambda: SQLiteStore(SQLiteStore.Config(path=tmp_path / "s"))  # noqa: E731
    one, other = make(), make()
    with one.transaction() as transaction:
        with pytest.raises(FeatureStoreError, match="database is locked"), other.transaction():
            pass
        transaction.write("v", {"a": b"1"})
    _fill(other, b=b"2")
    assert _all(one) == {"a": b"1", "b": b"2"}
