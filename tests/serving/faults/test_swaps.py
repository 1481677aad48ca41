# SPDX-License-Identifier: Apache-2.0
"""Swaps leave nothing behind: no bundle, no cache of one, no thread, no open file; and memory does not grow with them."""

import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from pipelines.steps.demo import free_port
from serving.engine import Loaded
from tests.serving.faults.served import POOLS, another_version, own_home, registry_of, served
from tests.serving.support import KNOWN, Switch, wait_until

ROOT = Path(__file__).parents[3]
Load = Callable[..., Loaded]


def test_ten_swaps_under_load_leave_nothing_behind(load: Load) -> None:
    """Bundles are freed by their counts of references alone: nobody waits for the collector of cycles."""
    seen: list[weakref.ref[Loaded]] = []

    def loader(version: int) -> Callable[[], Loaded]:
        def made() -> Loaded:
            loaded = load(version, rank_weight=version / 20)
            seen.append(weakref.ref(loaded))
            return loaded

        return made

    source = Switch(**{f"v{version}": loader(version) for version in range(1, 12)})
    with served(source, keep_previous_seconds=0.0, max_batch_rows=200) as server:
        stopped, codes = threading.Event(), []

        def ask(users: list[str]) -> None:
            while not stopped.is_set():
                codes.extend(server.ask(user, explain=False).status_code for user in users)

        with server.loses_nothing(POOLS):
            clients = [threading.Thread(target=ask, args=(KNOWN[place::3],)) for place in range(3)]
            for client in clients:
                client.start()
            for version in range(2, 12):
                source.wanted, before = version, len(codes)
                wait_until(lambda v=version, b=before: server.engine.loaded.version == v and len(codes) > b + 3)
            stopped.set()
            for client in clients:
                client.join(60)
        assert len(seen) == 11 and set(codes) == {200}
        wait_until(lambda: [each() for each in seen] == [None] * 10 + [server.engine.loaded], 20)
        wait_until(lambda: len(server.engine._tools.caches) == 1, 20)


def test_the_lists_of_a_bundle_that_is_kept_warm_are_kept_and_go_with_it(load: Load) -> None:
    source = Switch(v1=load, v2=lambda: load(2, rank_weight=1.0))
    with served(source, keep_previous_seconds=3.0) as server:
        hits = lambda: server.count("recsys_cache_lookups_total", cache="candidates", outcome="hit")  # noqa: E731
        assert server.is_whole()
        source.wanted = 2
        wait_until(lambda: server.engine.loaded.version == 2)
        assert server.is_whole() and hits() == 0, "another bundle has lists of its own"
        source.wanted = 1
        wait_until(lambda: server.engine.loaded.version == 1)
        assert server.is_whole() and hits() == 1, "and the former one has kept its own"
        wait_until(lambda: len(server.engine._tools.caches) == 1, 20)


@pytest.mark.slow
def test_a_hundred_swaps_of_a_process_do_not_grow_its_memory(tiny_run: Any, tmp_path: Path) -> None:
    home = own_home(tiny_run.home, tmp_path)
    registry = registry_of(home)
    another_version(registry)
    port = free_port()
    options = ["--keep-previous-seconds", "0", "--poll-seconds", "0.05", "--recommend-deadline-ms", "10000"]
    command = [sys.executable, "-m", "serving", "--port", str(port), "--home", str(home), *options]
    with (tmp_path / "log").open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    watched = psutil.Process(process.pid)
    stopped, codes = threading.Event(), []

    def version() -> int | None:
        try:
            return int(httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=30, trust_env=False).json()["version"] or 0)
        except httpx.TransportError:
            return None

    def ask() -> None:
        number = 0
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            while not stopped.is_set():
                number += 1
                codes.append(client.post("/v1/recommend", json={"user_id": str(number % 500), "k": 5}).status_code)
                time.sleep(0.01)

    held: dict[int, tuple[int, int]] = {}
    memory: dict[int, int] = {}
    try:
        wait_until(lambda: bool(version()), 180)
        clients = [threading.Thread(target=ask) for _ in range(2)]
        for client in clients:
            client.start()
        for swap in range(1, 101):
            wanted = registry.rollback("recsys", reason="a test").to_version
            wait_until(lambda w=wanted: version() == w)
            if swap in (20, 100):
                memory[swap] = min(watched.memory_info().rss for _ in range(20) if time.sleep(0.1) is None)
                held[swap] = (watched.num_threads(), watched.num_fds())
        stopped.set()
        for client in clients:
            client.join(60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "log").read_text()
    finally:
        stopped.set()
        if process.poll() is None:
            process.kill()
            process.wait(30)
    assert set(codes) == {200}
    assert memory[100] <= 1.05 * memory[20], memory
    assert held[100][0] <= held[20][0] + 2 and held[100][1] <= held[20][1] + 4, held
