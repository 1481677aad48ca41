# SPDX-License-Identifier: Apache-2.0
"""Real servers for tests: each is started where a test needs one, and ends with the tests."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """A Redis server that keeps nothing on disk, at the URL of a socket in a folder whose path is short."""
    socket = folder / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        url, end = f"unix://{socket}", time.monotonic() + 30
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"redis-server did not start: exit status {process.poll()}")
            time.sleep(0.02)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def _answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False
