# SPDX-License-Identifier: Apache-2.0
"""A real server on a real socket, what it holds at a moment, and homes of its own for a test that breaks them."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from mlflow import MlflowClient
from prometheus_client.parser import text_string_to_metric_families

from recsys.registry import Evidence, Location, Registry
from serving.app import create_app
from serving.engine import Engine
from serving.security import protocol
from serving.security.protocol import BoundedProtocol
from tests.serving.support import KNOWN, settings, wait_until

COMPARISON = {"list.ndcg@10": {"estimate": 0.0, "low": 0.0, "high": 0.0}}
TOGETHER = 16
POOLS = 24
"""Files and sockets that pools of connections, of server and test alike, may open when they are first used so; a repetition adds none."""


@dataclass(frozen=True)
class Held:
    """What a server holds: requests under way, connections, threads, open files."""

    tasks: int
    connections: int
    threads: int
    files: int


@dataclass
class Server:
    """A server that runs."""

    port: int
    engine: Engine
    uvicorn: uvicorn.Server
    _is_warm: bool = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, user: str = KNOWN[0], **body: Any) -> httpx.Response:
        """One recommendation, over a connection of its own."""
        return httpx.post(self.address + "/v1/recommend", json={"user_id": user, "k": 5, **body}, timeout=60, trust_env=False)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.address + path, timeout=60, trust_env=False)

    def is_whole(self, user: str = KNOWN[0]) -> bool:
        """Whether a normal request is answered in full."""
        answer = self.ask(user)
        return answer.status_code == 200 and answer.json()["flags"] == [] and len(answer.json()["items"]) == 5

    def count(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(self.get("/metrics").text)
        return sum(s.value for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items())

    def failures(self) -> float:
        """Requests that were answered with a failure of the server's own."""
        return sum(self.count("recsys_requests_total", status=status) for status in ("500", "502"))

    def held(self) -> Held:
        state = self.uvicorn.server_state
        # Threads of the pools of the event loop stay for the next call, up to a fixed number.
        threads = [thread for thread in threading.enumerate() if not thread.name.startswith(("asyncio_", "uvloop_", "AnyIO"))]
        return Held(len(state.tasks), len(state.connections), len(threads), len(os.listdir("/proc/self/fd")))

    def warm(self) -> None:
        """As many requests at one time as will be, so that what is kept for later requests is there."""
        if not self._is_warm:
            with ThreadPoolExecutor(TOGETHER) as pool:
                assert all(answer.status_code == 200 for answer in pool.map(self.ask, KNOWN[:TOGETHER]))
            self._is_warm = True
        wait_until(lambda: self.held().connections == 0, 10)

    @contextmanager
    def loses_nothing(self, files: int = 0) -> Iterator[None]:
        """After what is done inside, a normal request is answered in full, nothing was a failure, and nothing but ``files`` stays."""
        self.warm()
        before, failures = self.held(), self.failures()
        wait_until(lambda: self.held().connections == 0, 10)
        yield
        wait_until(self.is_whole, 20)
        self._comes_back_to(replace(before, files=before.files + files))
        assert self.failures() == failures
        assert self.count("recsys_requests_waiting") == self.count("recsys_queue_rows") == 0

    def _comes_back_to(self, before: Held, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not self._holds_no_more_than(before, now := self.held()):
            assert time.monotonic() < end, (
                f"before: {before}; still: {now}: {sorted(thread.name for thread in threading.enumerate())}, {_open_files()}"
            )
            time.sleep(0.02)

    def _holds_no_more_than(self, before: Held, now: Held) -> bool:
        return (now.tasks, now.connections) == (0, 0) and now.threads <= before.threads and now.files <= before.files


@contextmanager
def served(source: Any, *, bounds: dict[str, str] | None = None, closing: Any = (), engine: Any = None, **changed: Any) -> Iterator[Server]:
    """A server over a source, or over ``engine``.

    Args:
        source: of the engine.
        bounds: of the protocol, which reads the environment.
        closing: what ends with the engine.
        engine: made of the settings; one over the source by default.
        changed: of the settings.
    """
    chosen = settings(**changed)
    made: Engine = Engine(source, chosen) if engine is None else engine(chosen)
    application = create_app(made, chosen, *closing)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (bounds or {}).items():
            patch.setenv(f"RECSYS_SERVE_{name.upper()}", value)
        protocol._bounds.cache_clear()
        config = uvicorn.Config(application, port=0, http=BoundedProtocol, ws="none", log_level="critical", timeout_keep_alive=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            wait_until(lambda: server.started)
            wait_until(lambda: made.loaded is not None)
            yield Server(server.servers[0].sockets[0].getsockname()[1], made, server)
        finally:
            server.should_exit = True
            thread.join(60)
            protocol._bounds.cache_clear()
            assert not thread.is_alive(), "the server ends"


def own_home(home: Path, folder: Path) -> Path:
    """A copy of a home that a test may break. The artifacts stay where they are."""
    for name in ("mlflow.db", "online"):
        (shutil.copytree if (home / name).is_dir() else shutil.copy)(home / name, folder / name)
    return folder


def another_version(registry: Registry, *, source: str | None = None, promoted: bool = True) -> int:
    """The champion's bundle registered once more, from another place if one is given, and made the champion."""
    champion = registry.log.champion("recsys")
    assert champion is not None
    client = MlflowClient(registry.location.tracking_uri, registry.location.tracking_uri)
    first = client.get_model_version("recsys", str(champion.to_version))
    version = int(client.create_model_version("recsys", source or first.source, first.run_id, tags=first.tags).version)
    if promoted:
        evidence = Evidence.of(registry.download("recsys", version), COMPARISON)
        registry.promote("recsys", version, gates=(), evidence=evidence, expected=champion.to_version)
    return version


def registry_of(home: Path) -> Registry:
    return Registry(Location.under(home))


def answers_in_time(server: Server, users: list[str], seconds: float) -> list[list[str]]:
    """The flags of an answer to each user, each a whole list before its deadline."""
    flags = []
    for user in users:
        began = time.monotonic()
        answer = server.ask(user, deadline_ms=1000 * seconds)
        took = time.monotonic() - began
        assert answer.status_code == 200 and len(answer.json()["items"]) == 5, answer.text
        assert took < seconds + 1.0, "the client's own time, too, is within a second of the deadline"
        flags.append(answer.json()["flags"])
    return flags


def _open_files() -> list[str]:
    """What the open files of this process are, for a message."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    return sorted(names)
