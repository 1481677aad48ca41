# SPDX-License-Identifier: Apache-2.0
"""The server as a process of its own: its orderly end, and several workers on one port."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipelines.steps.demo import free_port
from tests.serving.support import wait_until

pytestmark = pytest.mark.slow
BODY = {"user_id": "3", "k": 3, "deadline_ms": 10_000}


@contextmanager
def process(home: Path, log: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port()
    command = [sys.executable, "-m", "serving", "--port", str(port), "--home", str(home), *options]
    with log.open("wb") as output:
        server = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=output, stderr=subprocess.STDOUT)
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        if server.poll() is None:
            server.kill()
        server.wait(30)


def status(address: str, path: str = "/readyz") -> int:
    try:
        return httpx.get(address + path, timeout=30, trust_env=False).status_code
    except httpx.TransportError:
        return 0


def test_sigterm_is_unready_then_drained_then_status_zero(tiny_run: Any, tmp_path: Path) -> None:
    with process(tiny_run.home, tmp_path / "log", "--grace-seconds", "6", "--recommend-deadline-ms", "10000") as (server, address):
        wait_until(lambda: status(address) == 200, 180)
        codes: list[int] = []
        stopped = threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
                while not stopped.is_set():
                    codes.append(client.post("/v1/recommend", json=BODY).status_code)

        clients = [threading.Thread(target=ask) for _ in range(2)]
        for client in clients:
            client.start()
        wait_until(lambda: len(codes) > 10)
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: status(address) == 503, 5)
        assert status(address, "/livez") == 200
        before = len(codes)
        wait_until(lambda: len(codes) > before + 5, 10)
        stopped.set()
        for client in clients:
            client.join(30)
        assert set(codes) == {200}, "whoever asked during the grace was answered"
        assert server.wait(30) == 0, (tmp_path / "log").read_text()


def test_workers_share_a_port_and_count_together(tiny_run: Any, tmp_path: Path) -> None:
    with process(tiny_run.home, tmp_path / "log", "--workers", "2", "--recommend-deadline-ms", "10000") as (server, address):

        def workers() -> set[int]:
            return {int(line.split()[2]) for line in (tmp_path / "log").read_text().splitlines() if "live: recsys" in line}

        wait_until(lambda: len(workers()) == 2 and status(address) == 200, 240)
        for _ in range(40):
            assert httpx.post(address + "/v1/recommend", json=BODY, timeout=30, trust_env=False).status_code == 200

        def answered() -> float:
            families = text_string_to_metric_families(httpx.get(address + "/metrics", trust_env=False).text)
            samples = [s for family in families for s in family.samples if s.name == "recsys_requests_total"]
            return sum(s.value for s in samples if s.labels["route"] == "/v1/recommend")

        assert {answered() for _ in range(20)} == {40.0}, "whichever worker is asked"

        # One is killed: the other goes on, and a new one takes its place.
        killed = min(workers())
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: len(workers()) == 3, 120)
        time.sleep(0.5)
        assert answered() == 40.0
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, (tmp_path / "log").read_text()
