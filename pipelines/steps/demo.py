# SPDX-License-Identifier: Apache-2.0
"""Start the server as a user would, ask it over HTTP, and stop it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from recsys.core.errors import RecsysError
from recsys.registry.location import HOME

# The figures of this request are shown, not measured: it waits for a machine that is busy with something else.
_DEADLINE_MS = 10_000


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(home: Path, model: str, log: Path, *, timeout: float = 180.0) -> Iterator[httpx.Client]:
    """A client of a freshly started server that is ready; the server is stopped at the end.

    Args:
        home: the folder of the registry.
        model: what to serve, ``models:/name@alias``.
        log: where the server's output goes.
        timeout: seconds to wait until it is ready.

    Raises:
        RecsysError: it did not become ready; names the log.
    """
    port = free_port()
    command = [sys.executable, "-m", "serving", "--port", str(port), "--model", model]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, HOME: str(home)}, stdout=output, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            _wait_until_ready(client, process, log, time.monotonic() + timeout)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path, until: float) -> None:
    message = "no answer"
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RecsysError(f"the server ended with status {process.returncode}; see {log}")
        try:
            answer = client.get("/readyz")
            if answer.status_code == 200:
                return
            message = answer.json().get("message", "not ready")
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RecsysError(f"the server did not become ready: {message}; see {log}")


def ask(client: httpx.Client, user_id: str, k: int) -> dict[str, Any]:
    """One recommendation over HTTP."""
    answer = client.post("/v1/recommend", json={"user_id": user_id, "k": k, "deadline_ms": _DEADLINE_MS})
    answer.raise_for_status()
    result: dict[str, Any] = answer.json()
    return result
