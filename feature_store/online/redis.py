# SPDX-License-Identifier: Apache-2.0
"""An online store in a Redis server, for servers on several machines.

Redis has no snapshots, so values carry versions. An entity's value is a hash from the numbers of attempts to write to what each wrote, and
one hash, the head, says which attempt was committed last: a reader takes the newest value up to that. An attempt's values are in nobody's
sight until one command makes it the head. Where a writer died before, the next one removes what it left.

A request's values and the head come back from one script, one round trip, many values in one reply: a client in Python takes longer to read
a thousand replies than Redis to find them. A snapshot that is read from later goes on seeing its own head;
what it sees is kept for ``keep_seconds`` after the next commit, and an error after that.

Keys, below ``prefix``: ``head``; ``attempt``, the last number; ``commits``, when each attempt was committed; ``lock``, whose turn it is;
``written:N``, the keys that attempt N wrote to; ``entities:E:view`` and ``value:E:length:view:entity`` for a view whose values were last
cleared by attempt E; ``dropped``, keys of cleared views by the attempt that dropped them.
"""

import json
import os
import secrets
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar, cast

import redis
from pydantic import Field, PositiveFloat

from feature_store.online import redis_scripts as scripts
from feature_store.online.base import FeatureStoreError, OnlineStore, Snapshot, Transaction, ViewState
from recsys.core.components import register
from recsys.core.config import Config as BaseConfig

FORMAT = 1
T = TypeVar("T")
BUSY_SECONDS = 30.0
LOCK_SECONDS = 30.0
"""How long a writer that says nothing keeps its turn."""
_TOO_LATE = "a write took longer than its turn; nothing of it is seen"
BATCH = 500
"""Keys that are written, or commands that are sent, at a time."""


@dataclass(frozen=True)
class _Head:
    """What was committed last.

    Attributes:
        id: how many transactions were committed.
        attempt: the number of the last one.
        oldest: the oldest attempt whose values are all there.
        states: by view, and the attempt that last cleared it.
    """

    id: int
    attempt: int
    oldest: int
    states: Mapping[str, tuple[ViewState, int]]

    @classmethod
    def read(cls, found: Mapping[bytes, bytes]) -> "_Head":
        states = json.loads(found.get(b"states", b"{}"))
        own = {view: (ViewState(version, watermark), epoch) for view, (version, watermark, epoch) in states.items()}
        return cls(int(found.get(b"id", 0)), int(found.get(b"attempt", 0)), int(found.get(b"oldest", 0)), own)


class _RedisSnapshot(Snapshot):
    """See the module; asks for nothing until it is asked."""

    def __init__(self, store: "RedisStore") -> None:
        self._store, self._client = store, store.client
        self._head: _Head | None = None

    @property
    def id(self) -> int:  # type: ignore[override]  # known once it has been read
        return self._known().id

    def states(self) -> Mapping[str, ViewState]:
        return {view: state for view, (state, _) in self._known().states.items() if state.version}

    def multi_get(self, wanted: Mapping[str, Sequence[str]]) -> dict[str, list[bytes | None]]:
        epochs = self._epochs(wanted)
        while True:
            found = self._read(epochs, wanted)
            now = self._epochs(wanted)
            if now == epochs:
                return found
            epochs = now  # a view was cleared since this process last looked

    def scan(self, view: str) -> Iterator[tuple[str, bytes]]:
        epoch = self._epoch(view)
        members = cast(set[bytes], self._client.smembers(self._store.key("entities", epoch, view)))
        for some in _parts(sorted(member.decode() for member in members), BATCH):
            values = self.multi_get({view: some})[view]
            yield from ((entity, value) for entity, value in zip(some, values, strict=True) if value is not None)

    def _known(self) -> _Head:
        if self._head is None:
            self._take(self._store.head())
        assert self._head is not None
        return self._head

    def _take(self, head: _Head) -> None:
        """The head as it is now: this snapshot's, where it has none, else only whether that is still there."""
        if self._head is None:
            self._head = head
        elif head.oldest > self._head.attempt:
            raise self._store.error(f"a snapshot was read from for longer than keep_seconds={self._store.config.keep_seconds:g}")
        self._store.epochs = {view: epoch for view, (_, epoch) in head.states.items()}

    def _read(self, epochs: Mapping[str, int], wanted: Mapping[str, Sequence[str]]) -> dict[str, list[bytes | None]]:
        store = self._store
        keys = [store.value(epochs[view], view, entity) for view, entities in wanted.items() for entity in entities]
        last = "" if self._head is None else self._last()
        head, lengths, parts = store.read([store.key("head"), *keys], [last, scripts.TOGETHER])
        self._take(store.head(dict(zip(head[::2], head[1::2], strict=True))))
        rest = scripts.cut(lengths, b"".join(parts))
        return {view: list(islice(rest, len(entities))) for view, entities in wanted.items()}

    def _last(self) -> int:
        """The newest attempt that this reader sees."""
        return self._known().attempt

    def _epochs(self, wanted: Mapping[str, Any]) -> dict[str, int]:
        """Where the values of views stand, as far as is known; a guess before anything was read."""
        if self._head is None:
            return {view: self._store.epochs.get(view, 0) for view in wanted}
        return {view: self._epoch(view) for view in wanted}

    def _epoch(self, view: str) -> int:
        """Of a view that is not there: 0, for which there are no values."""
        found = self._known().states.get(view)
        return 0 if found is None else found[1]


class _RedisTransaction(_RedisSnapshot, Transaction):
    """An attempt."""

    def __init__(self, store: "RedisStore", token: str) -> None:
        super().__init__(store)
        self._token = token
        self._known()
        self.attempt = self._client.incr(store.key("attempt"))
        self._states = dict(self._known().states)
        self._dropped: list[tuple[str, int]] = []

    def states(self) -> Mapping[str, ViewState]:
        return {view: state for view, (state, _) in self._states.items() if state.version}

    def write(self, view: str, values: Mapping[str, bytes]) -> None:
        if view not in self._states:
            self._states[view] = (ViewState("", None), self.attempt)
        store, epoch = self._store, self._epoch(view)
        keys = [store.key("lock"), store.key("written", self.attempt), store.key("entities", epoch, view)]
        for some in _parts(values.items(), BATCH):
            given = [part for entity, value in some for part in (store.value(epoch, view, entity), entity, value)]
            if not self._client.eval(scripts.WRITE, len(keys), *keys, self._token, self.attempt, _turn_ms(), *given):
                raise store.error(_TOO_LATE)

    def clear(self, view: str) -> None:
        if view in self._states:
            self._dropped.append((view, self._epoch(view)))
        self._states[view] = (ViewState("", None), self.attempt)

    def set_state(self, view: str, state: ViewState) -> None:
        self._states[view] = (state, self._states[view][1] if view in self._states else self.attempt)

    def _last(self) -> int:
        return self.attempt

    def _epoch(self, view: str) -> int:
        return self._states[view][1] if view in self._states else 0

    def commit(self) -> None:
        """Make it the head.

        Raises:
            FeatureStoreError: this writer's turn was over.
        """
        store, head = self._store, self._known()
        states = {view: [state.version, state.watermark, epoch] for view, (state, epoch) in self._states.items()}
        if self._dropped:
            self._client.rpush(store.key("dropped", self.attempt), *(json.dumps(one) for one in self._dropped))
        keys = [store.key("lock"), store.key("head"), store.key("commits")]
        given: list[str | int] = [self._token, head.attempt, self.attempt, head.id + 1, json.dumps(states), FORMAT]
        if not self._client.eval(scripts.COMMIT, len(keys), *keys, *given):
            raise store.error(_TOO_LATE)


@register("online_store", "redis")
class RedisStore(OnlineStore):
    """See the module.

    Raises:
        FeatureStoreError: from every method, where the server cannot be reached, answers with an error, or holds another format.
    """

    class Config(BaseConfig):
        """Where the server is.

        Attributes:
            url: such as ``redis://host:6379/0``, ``rediss://…`` or ``unix:///path``, without a password.
            password_env: the environment variable that holds the password; null for none.
            prefix: stands before all keys, so that one server can hold several stores.
            timeout: seconds for an answer.
            keep_seconds: how long a snapshot can still be read from after the next commit.
        """

        name: Literal["redis"] = "redis"
        url: str = "redis://localhost:6379/0"
        password_env: str | None = None
        prefix: str = Field("recsys", min_length=1)
        timeout: PositiveFloat = 5.0
        keep_seconds: PositiveFloat = 30.0

    def __init__(self, config: Config) -> None:
        self.config = config
        self.epochs: dict[str, int] = {}
        password = None
        if config.password_env is not None:
            password = os.environ.get(config.password_env)
            if password is None:
                raise self.error(f"password_env: {config.password_env} is not set")
        timeouts = {"socket_timeout": config.timeout, "socket_connect_timeout": config.timeout}
        with self._named():
            self.client = redis.Redis.from_url(config.url, password=password, **timeouts)
            self.read = self.client.register_script(scripts.READ)
            self.client.script_load(scripts.READ)  # so that the first request is one round trip as well
            self.head()

    def error(self, what: str) -> FeatureStoreError:
        """An error that names the store."""
        return FeatureStoreError(f"online store {self.config.url}: {what}")

    def head(self, found: Mapping[bytes, bytes] | None = None) -> _Head:
        """What was committed last, of what Redis says of it; it is asked where that is not given."""
        if found is None:
            found = cast(dict[bytes, bytes], self.client.hgetall(self.key("head")))
        if found and int(found[b"format"]) != FORMAT:
            raise self.error(f"expected format {FORMAT}, got {int(found[b'format'])}")
        return _Head.read(found)

    def key(self, *parts: object) -> str:
        """A key of this store."""
        return ":".join(map(str, (self.config.prefix, *parts)))

    def value(self, epoch: int, view: str, entity: str) -> str:
        """The key of an entity's value."""
        return self.key("value", epoch, len(view), view, entity)

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """See `OnlineStore.snapshot`."""
        with self._named():
            yield _RedisSnapshot(self)

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """See `OnlineStore.transaction`."""
        with self._named():
            token = self._turn()
            try:
                self._tidy()
                transaction = _RedisTransaction(self, token)
                yield transaction
                transaction.commit()
            except BaseException:
                if self.client.get(self.key("lock")) == token.encode():
                    self._undo_unseen()
                raise
            finally:
                self.client.eval(scripts.RELEASE, 1, self.key("lock"), token)

    def forget(self, views: Collection[str], entity: str) -> tuple[str, ...]:
        """See `OnlineStore.forget`. It waits for its turn, as a writer does, and erases all versions, so that older snapshots show nothing.

        What Redis itself wrote to disk (RDB, AOF) holds older commands until it writes these files again.
        """
        with self._named():
            token = self._turn()
            try:
                self._tidy()
                return self._erase(views, entity)
            finally:
                self.client.eval(scripts.RELEASE, 1, self.key("lock"), token)

    def close(self) -> None:
        """Close all connections."""
        self.client.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise self.error(str(error)) from error

    def _turn(self) -> str:
        """Wait for this writer's turn."""
        token, end = secrets.token_hex(16), time.monotonic() + BUSY_SECONDS
        while not self.client.set(self.key("lock"), token, nx=True, px=_turn_ms()):
            if time.monotonic() > end:
                raise self.error(f"locked by another writer for {BUSY_SECONDS:g} s")
            time.sleep(0.005)
        return token

    def _tidy(self) -> None:
        """Remove what dead writers left, and the values that no snapshot can ask for any more."""
        self._undo_unseen()
        now, _ = self.client.time()
        old = [int(n) for n in cast(list[bytes], self.client.zrangebyscore(self.key("commits"), "-inf", now - self.config.keep_seconds))]
        # The newest of the old commits is still seen, until the one after it is old as well.
        gone, horizon = (old[:-1], old[-1]) if old else ([], 0)
        if not gone:
            return
        self.client.hset(self.key("head"), "oldest", horizon)
        for attempt in old:
            for keys in self._written(attempt):
                pipeline = self.client.pipeline(transaction=False)
                for key, fields in zip(keys, self._fields(keys), strict=True):
                    past = sorted(number for number in fields if number <= horizon)[:-1]
                    if past:
                        pipeline.hdel(key, *map(str, past))
                pipeline.execute()
            for view, epoch in map(json.loads, cast(list[bytes], self.client.lrange(self.key("dropped", attempt), 0, -1))):
                self._drop(view, epoch)
            self.client.delete(self.key("written", attempt), self.key("dropped", attempt))
        self.client.zrem(self.key("commits"), *gone)

    def _undo_unseen(self) -> None:
        """Remove the values of attempts after the head, whose writers are gone: it is this one's turn."""
        head = self.head()
        last = int(cast(bytes | None, self.client.get(self.key("attempt"))) or 0)
        for attempt in range(head.attempt + 1, last + 1):
            for keys in self._written(attempt):
                pipeline = self.client.pipeline(transaction=False)
                for key in keys:
                    pipeline.hdel(key, str(attempt))
                pipeline.execute()
            self.client.delete(self.key("written", attempt), self.key("dropped", attempt))

    def _drop(self, view: str, epoch: int) -> None:
        """Remove all that a view held before it was cleared."""
        entities = self.key("entities", epoch, view)
        for some in _parts(self.client.sscan_iter(entities, count=BATCH), BATCH):
            self.client.unlink(*(self.value(epoch, view, entity.decode()) for entity in some))
        self.client.unlink(entities)

    def _erase(self, views: Collection[str], entity: str) -> tuple[str, ...]:
        """Remove an entity's values of every epoch that is still there, in one transaction of Redis."""
        attempts = [int(number) for number in cast(list[bytes], self.client.zrange(self.key("commits"), 0, -1))]
        dropped = [
            json.loads(one) for number in attempts for one in cast(list[bytes], self.client.lrange(self.key("dropped", number), 0, -1))
        ]
        standing = [(view, epoch) for view, (_, epoch) in self.head().states.items()]
        places = [(view, epoch) for view, epoch in (*standing, *map(tuple, dropped)) if view in views]
        found = {view for view, epoch in places if self.client.exists(self.value(epoch, view, entity))}
        pipeline = self.client.pipeline(transaction=True)
        for view, epoch in places:
            value = self.value(epoch, view, entity)
            pipeline.delete(value)
            pipeline.srem(self.key("entities", epoch, view), entity)
            for number in attempts:
                pipeline.srem(self.key("written", number), value)
        if found:
            pipeline.hincrby(self.key("head"), "id", 1)
        pipeline.execute()
        return tuple(sorted(found))

    def _written(self, attempt: int) -> Iterator[tuple[bytes, ...]]:
        """The keys that an attempt wrote to."""
        return _parts(self.client.sscan_iter(self.key("written", attempt), count=BATCH), BATCH)

    def _fields(self, keys: Sequence[bytes]) -> list[list[int]]:
        """The attempts that wrote to each key."""
        pipeline = self.client.pipeline(transaction=False)
        for key in keys:
            pipeline.hkeys(key)
        return [[int(field) for field in fields] for fields in pipeline.execute()]


def _parts(things: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """All things, so many at a time."""
    rest = iter(things)
    while part := tuple(islice(rest, size)):
        yield part


def _turn_ms() -> int:
    return int(1000 * LOCK_SECONDS)
