# SPDX-License-Identifier: Apache-2.0
"""A feature store that is gone, slow, or gives garbage: SQLite's file and a real Redis server, under a server that goes on answering."""

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from feature_store.definitions import FeatureRepo
from feature_store.online import OnlineReader, OnlineStore
from feature_store.online.redis import RedisStore
from recsys.bundle.bundle import Bundle
from recsys.core.config import parse
from serving.engine import FLAGS, Loaded, RegistrySource
from serving.engine.work import CACHED_FEATURES, POPULAR, RETRIEVER_ONLY
from tests.serving.faults.served import POOLS, Server, another_version, answers_in_time, own_home, registry_of, served
from tests.serving.support import KNOWN, Faulty, Switch, wait_until

USERS = KNOWN[:6]
SECONDS = 1.5
WITHOUT_FEATURES = {CACHED_FEATURES, RETRIEVER_ONLY, POPULAR}
QUICK = {"breaker_failures": 3, "breaker_seconds": 0.3, "read_threads": 4, "reserve_ms": 100}


class Redis:
    """A server that can be killed, stopped, and started again over what it wrote down."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.start()

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        command = ["redis-server", *options, "--dir", str(self._folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(self._answers, 30)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(30)

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait(30)

    def _answers(self) -> bool:
        with socket.socket() as asked:
            if asked.connect_ex(("127.0.0.1", self.port)):
                return False
            asked.settimeout(5)
            asked.sendall(b"PING\r\n")
            return asked.recv(100).startswith(b"+PONG")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    started = Redis(tmp_path)
    yield started
    started.end()


def repo_of(bundle: Bundle) -> FeatureRepo:
    return parse(FeatureRepo, bundle.features, source="features.json")


def copied(source: OnlineStore, target: OnlineStore) -> None:
    """All of a store in another one."""
    with source.snapshot() as snapshot, target.transaction() as transaction:
        for view, state in snapshot.states().items():
            transaction.write(view, dict(snapshot.scan(view)))
            transaction.set_state(view, state)


@pytest.fixture
def over_redis(redis: Redis, bundle: Bundle, online: OnlineReader) -> Iterator[Server]:
    """A server whose bundle's features are in Redis, which is closed with the bundle."""
    config = RedisStore.Config(url=f"redis://127.0.0.1:{redis.port}/0", timeout=2.0)
    writer = RedisStore(config)
    copied(online._store, writer)
    writer.close()

    def load(version: int) -> Loaded:
        store = RedisStore(config)
        return Loaded.of(bundle, OnlineReader(repo_of(bundle), store), name="recsys", version=version, sample=KNOWN[:2], close=store.close)

    with served(Switch(v1=lambda: load(1), v2=lambda: load(2)), **QUICK) as server:
        yield server


def falls_back(server: Server, *, must: bool = True) -> None:
    """Everybody gets a list in time; not all of them whole."""
    flags = {flag for each in answers_in_time(server, [*USERS, "never seen before"], SECONDS) for flag in each}
    assert flags <= set(FLAGS) - {"short_list"}
    assert not must or flags & WITHOUT_FEATURES, "else nothing was broken"


def test_redis_that_is_killed_and_started_again(over_redis: Server, redis: Redis) -> None:
    with over_redis.loses_nothing(POOLS):
        redis.signal(signal.SIGKILL)
        falls_back(over_redis)
        assert over_redis.get("/readyz").status_code == 503 and over_redis.get("/livez").status_code == 200
        redis.start()


def test_redis_that_is_killed_again_and_again_adds_nothing(over_redis: Server, redis: Redis) -> None:
    def once() -> None:
        redis.signal(signal.SIGKILL)
        falls_back(over_redis)
        redis.start()
        wait_until(over_redis.is_whole, 20)

    once()
    with over_redis.loses_nothing():
        for _ in range(3):
            once()


def test_redis_that_hangs_and_goes_on(over_redis: Server, redis: Redis) -> None:
    """A stopped process: connections stand, and nothing comes back."""
    with over_redis.loses_nothing(POOLS):
        redis.signal(signal.SIGSTOP)
        falls_back(over_redis)
        redis.signal(signal.SIGCONT)


def test_a_bundle_that_comes_while_redis_is_gone_is_refused_and_comes_later(over_redis: Server, redis: Redis) -> None:
    source: Any = over_redis.engine._follower._source
    with over_redis.loses_nothing(POOLS):
        redis.signal(signal.SIGKILL)
        source.wanted = 2
        wait_until(lambda: over_redis.engine.problem is not None)
        falls_back(over_redis)
        assert over_redis.engine.loaded.version == 1
        redis.start()
        wait_until(lambda: over_redis.engine.loaded.version == 2)


def noise(value: bytes) -> bytes:
    return random.Random(0).randbytes(len(value))


GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "noise": noise,
    "nothing": lambda value: b"",
    "half of it": lambda value: value[: len(value) // 2],
    "something behind it": lambda value: value + b"more",
    "text": lambda value: b"<html>502 Bad Gateway</html>",
    "counts beyond all memory": lambda value: b"\xff" * len(value),
}


@pytest.mark.parametrize("fault", GARBAGE)
def test_values_in_redis_that_nobody_can_decode(over_redis: Server, redis: Redis, bundle: Bundle, online: OnlineReader, fault: str) -> None:
    store = RedisStore(RedisStore.Config(url=f"redis://127.0.0.1:{redis.port}/0"))
    with over_redis.loses_nothing(POOLS):
        with online._store.snapshot() as snapshot:
            values = {view: dict(snapshot.scan(view)) for view in snapshot.states()}
        with store.transaction() as transaction:
            for view, own in values.items():
                transaction.write(view, {entity: GARBAGE[fault](value) for entity, value in own.items()})
        falls_back(over_redis)
        with store.transaction() as transaction:
            for view, own in values.items():
                transaction.write(view, own)
    store.close()


def test_redis_that_comes_back_empty_gives_no_lists_for_users_without_a_history(over_redis: Server, redis: Redis) -> None:
    """What the store lacks are all views, not one user's events: that is a failure, and no news of a user."""
    with over_redis.loses_nothing(POOLS):
        store = RedisStore(RedisStore.Config(url=f"redis://127.0.0.1:{redis.port}/0"))
        kept = {key: store.client.dump(key) for key in store.client.scan_iter()}
        store.client.flushall()
        for flags in answers_in_time(over_redis, USERS, SECONDS):
            assert flags != [] and "new_user" not in flags
        for key, value in kept.items():
            store.client.restore(key, 0, value)
        store.close()


@contextmanager
def over_sqlite(home: Path) -> Iterator[tuple[Server, Path]]:
    """A server over a home of its own, and the file of its online store."""
    source = RegistrySource("models:/recsys@champion", registry_of(home).location)
    with served(source, **QUICK, keep_previous_seconds=0.0) as server:
        (path,) = (home / "online").glob("*.sqlite")
        yield server, path


def files_of(path: Path) -> list[Path]:
    """All but the index of the log, which SQLite maps: whoever truncates that ends every process that reads the store."""
    return [each for each in path.parent.iterdir() if each.name.startswith(path.name) and not each.name.endswith("-shm")]


def test_a_file_that_is_removed_is_read_on_and_its_bundle_is_not_loaded_again(tiny_run: Any, tmp_path: Path) -> None:
    home = own_home(tiny_run.home, tmp_path)
    with over_sqlite(home) as (server, path), server.loses_nothing(POOLS):
        aside = tmp_path / "aside"
        shutil.copytree(path.parent, aside)
        for file in files_of(path):
            file.unlink()
        assert all(flags == [] for flags in answers_in_time(server, USERS, SECONDS)), "an open file is there until it is closed"
        version = another_version(registry_of(home))
        wait_until(lambda: server.engine.problem is not None and "no such file" in server.engine.problem)
        assert server.is_whole() and server.engine.loaded.version != version
        ready = server.get("/readyz")
        assert ready.status_code == 200 and "no such file" in ready.json()["message"]
        for file in aside.iterdir():
            shutil.copy(file, path.parent)
        wait_until(lambda: server.engine.loaded.version == version)


@pytest.mark.parametrize("fault", ["noise", "nothing", "zeros"])
def test_a_file_that_is_overwritten_costs_rungs_and_comes_back(tiny_run: Any, tmp_path: Path, fault: str) -> None:
    home = own_home(tiny_run.home, tmp_path)
    with over_sqlite(home) as (server, path), server.loses_nothing(POOLS):
        good = {file: file.read_bytes() for file in files_of(path)}
        size = path.stat().st_size
        content = {"noise": random.Random(0).randbytes(size), "nothing": b"", "zeros": bytes(size)}[fault]
        for file in files_of(path):
            overwrite(file, content[: file.stat().st_size])
        falls_back(server, must=False)
        for file, before in good.items():
            overwrite(file, before)


def overwrite(path: Path, content: bytes) -> None:
    """In place, as a faulty disk would: the file stays the same one."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate(len(content))


def wrong_types(table: pa.Table) -> pa.Table:
    return table.set_column(2, table.column_names[2], pa.array(["no number"] * table.num_rows))


READS: dict[str, dict[str, Any]] = {
    "slow": {"delay": 2 * SECONDS},
    "gone": {"error": OSError("the store is gone")},
    "of wrong types": {"garbage": wrong_types},
    "of too few values": {"garbage": lambda table: table.slice(0, max(0, table.num_rows - 1))},
    "of too many values": {"garbage": lambda table: pa.concat_tables([table, table])},
    "of another kind": {"garbage": lambda table: {"rows": 3}},
}


@pytest.mark.parametrize("fault", READS)
def test_reads_that_are(load: Callable[..., Loaded], faulty: Faulty, fault: str) -> None:
    with served(Switch(v1=lambda: load(reader=faulty)), **QUICK | {"read_threads": 8}) as server, server.loses_nothing(POOLS):
        for name, value in READS[fault].items():
            setattr(faulty, name, value)
        falls_back(server)
        faulty.heal()
        wait_until(lambda: not server.engine.breaker.open, 20)


def test_a_store_is_tried_again_while_the_registry_hangs(load: Callable[..., Loaded], faulty: Faulty) -> None:
    """Nobody sends requests to a server that is not ready: it has to find out by itself that its store is back."""

    class Hanging(Switch):
        hangs = False

        def target(self) -> Any:
            while self.hangs:
                time.sleep(0.05)
            return super().target()

    source = Hanging(v1=lambda: load(reader=faulty))
    with served(source, **QUICK) as server:
        server.warm()
        source.hangs = True
        faulty.error = OSError("the store is gone")
        falls_back(server)
        assert server.get("/readyz").status_code == 503
        faulty.heal()
        wait_until(lambda: server.get("/readyz").status_code == 200, 10)
        source.hangs = False


def test_idle_connections_to_a_store_are_closed_with_its_bundle(tiny_run: Any, tmp_path: Path) -> None:
    home = own_home(tiny_run.home, tmp_path)
    with over_sqlite(home) as (server, path):
        server.warm()
        version = another_version(registry_of(home))
        wait_until(lambda: server.engine.loaded.version == version)
        assert server.is_whole()
        opened = sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(path.resolve()) for fd in os.listdir("/proc/self/fd"))
        assert opened <= 2 + QUICK["read_threads"]
