# SPDX-License-Identifier: Apache-2.0
"""What only the Redis store has to get right: writers that die or come too late, and values that nobody can ask for any more."""

import uuid
from typing import Any

import pytest
import redis

from feature_store.online import FeatureStoreError, RedisStore, ViewState


def make(url: str, **given: Any) -> RedisStore:
    return RedisStore(RedisStore.Config(url=url, **{"prefix": uuid.uuid4().hex, **given}))


def fill(store: RedisStore, **values: bytes) -> None:
    with store.transaction() as transaction:
        transaction.write("v", values)
        transaction.set_state("v", ViewState("1", 7))


def content(store: RedisStore) -> dict[str, bytes]:
    with store.snapshot() as snapshot:
        return dict(snapshot.scan("v"))


def test_a_request_is_one_round_trip(redis_url: str) -> None:
    store = make(redis_url)
    fill(store, a=b"1", b=b"2")
    fill(store, a=b"3")
    reader = RedisStore(store.config)
    for expected in (2, 1):  # at first it does not know where the view stands
        sent = []
        execute = reader.client.connection_pool.get_connection

        def counted(*given: Any, sent: list[int] = sent, execute: Any = execute, **named: Any) -> Any:
            sent.append(1)
            return execute(*given, **named)

        reader.client.connection_pool.get_connection = counted  # type: ignore[method-assign]
        with reader.snapshot() as snapshot:
            assert snapshot.multi_get({"v": ["a", "b", "c"], "w": ["a"]}) == {"v": [b"3", b"2", None], "w": [None]}
            assert snapshot.states() == {"v": ViewState("1", 7)}
        reader.client.connection_pool.get_connection = execute  # type: ignore[method-assign]
        assert len(sent) == expected


def test_what_a_dead_writer_left_is_never_seen_and_goes(redis_url: str) -> None:
    store = make(redis_url)
    fill(store, a=b"1")
    dead = store.transaction()
    transaction = dead.__enter__()
    transaction.write("v", {"a": b"dead", "z": b"dead"})
    del transaction
    store.client.delete(store.key("lock"))  # as its turn ends when its process does
    assert content(store) == {"a": b"1"}
    fill(store, b=b"2")
    assert content(store) == {"a": b"1", "b": b"2"}
    keys = [key for key in store.client.keys(store.key("value", "*")) if b"z" in key.rsplit(b":", 1)[-1]]
    assert keys == []


def test_a_writer_that_comes_too_late_changes_nothing(redis_url: str) -> None:
    store, other = make(redis_url), None
    fill(store, a=b"1")
    other = RedisStore(store.config)
    with pytest.raises(FeatureStoreError, match="a write took longer than its turn; nothing of it is seen"), store.transaction() as late:
        late.write("v", {"a": b"late"})
        store.client.delete(store.key("lock"))
        fill(other, b=b"2")
        late.write("v", {"c": b"late"})
    with pytest.raises(FeatureStoreError, match="a write took longer than its turn"), store.transaction() as late:
        late.write("v", {"a": b"late"})
        store.client.delete(store.key("lock"))
        fill(other, b=b"3")
    assert content(store) == content(other) == {"a": b"1", "b": b"3"}


def test_old_values_go_and_a_snapshot_that_wants_them_says_so(redis_url: str) -> None:
    store = make(redis_url, keep_seconds=0.001)
    fill(store, a=b"1")
    with store.snapshot() as snapshot:
        assert snapshot.multi_get({"v": ["a"]}) == {"v": [b"1"]}
        with store.transaction() as transaction:
            transaction.clear("v")
            transaction.write("v", {"a": b"2", "b": b"2"})
            transaction.set_state("v", ViewState("2", 8))
        assert snapshot.multi_get({"v": ["a"]}) == {"v": [b"1"]}
        _age_commits(store)
        fill(store, a=b"3")
        _age_commits(store)
        fill(store, a=b"4")
        with pytest.raises(FeatureStoreError, match=r"read from for longer than keep_seconds=0\.001"):
            snapshot.multi_get({"v": ["a"]})
    assert content(store) == {"a": b"4", "b": b"2"}
    fields = {key.rsplit(b":", 1)[-1]: len(store.client.hkeys(key)) for key in store.client.keys(store.key("value", "*"))}
    assert fields == {b"a": 2, b"b": 1}  # the one before the last commit, and that; of the cleared view nothing
    assert len(store.client.keys(store.key("written", "*"))) <= 2 and len(store.client.keys(store.key("entities", "*"))) == 1


def _age_commits(store: RedisStore) -> None:
    key = store.key("commits")
    for attempt, second in store.client.zrange(key, 0, -1, withscores=True):
        store.client.zadd(key, {attempt: second - 10})


def test_stores_of_other_prefixes_and_formats_are_apart(redis_url: str) -> None:
    one, other = make(redis_url), make(redis_url)
    fill(one, a=b"1")
    assert content(other) == {}
    one.client.hset(one.key("head"), "format", 9)
    with pytest.raises(FeatureStoreError, match="expected format 1, got 9"):
        RedisStore(one.config)


def test_errors_name_the_server(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    with pytest.raises(FeatureStoreError, match=r"online store redis://localhost:1/0: .*[Cc]onnect"):
        make("redis://localhost:1/0")
    with pytest.raises(FeatureStoreError, match="password_env: NO_SUCH_PASSWORD is not set"):
        make(redis_url, password_env="NO_SUCH_PASSWORD")
    store = make(redis_url)
    monkeypatch.setattr("feature_store.online.redis.BUSY_SECONDS", 0.02)
    with store.transaction(), pytest.raises(FeatureStoreError, match="locked by another writer"), store.transaction():
        pass
    monkeypatch.setattr(store.client, "hgetall", _fails)
    with pytest.raises(FeatureStoreError, match="gone"), store.snapshot() as snapshot:
        snapshot.states()


def _fails(*_: object) -> None:
    raise redis.ConnectionError("gone")


def test_no_key_names_whom_redis_forgot(redis_url: str) -> None:
    """Neither a version, nor a value of a view that was cleared, nor what a dead writer left, nor a list of what was written."""
    store, secret = make(redis_url), "never-to-be-found"
    fill(store, **{secret: b"1", "a": b"1"})
    fill(store, **{secret: b"2"})
    with store.transaction() as transaction:
        transaction.clear("v")
        transaction.write("v", {secret: b"3", "b": b"3"})
        transaction.set_state("v", ViewState("2", 8))
    dead = store.transaction()
    dead.__enter__().write("v", {secret: b"dead"})
    del dead
    store.client.delete(store.key("lock"))

    def names() -> set[bytes]:
        keys = set(store.client.keys(store.key("*")))
        return keys | {member for key in keys if store.client.type(key) == b"set" for member in store.client.smembers(key)}

    assert any(secret.encode() in name for name in names())
    with store.snapshot() as old:
        assert old.multi_get({"v": [secret]}) == {"v": [b"3"]}
        assert store.forget(["v"], secret) == ("v",)
        assert old.multi_get({"v": [secret, "b"]}) == {"v": [None, b"3"]}
    assert not any(secret.encode() in name for name in names())
    assert content(store) == {"b": b"3"} and store.forget(["v"], secret) == ()
