# SPDX-License-Identifier: Apache-2.0
"""A disk that is full: what cannot be written is dropped and counted, or refused; answers go on."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from feature_store.online import FeatureStoreError, SQLiteStore
from recsys.decisions.log import DecisionLog
from recsys.decisions.parts import read_decisions
from serving.decided import Decided
from serving.engine import Engine, Hosting, Loaded, RegistrySource
from tests.serving.faults.served import POOLS, Server, own_home, registry_of, served
from tests.serving.support import KNOWN, Switch, wait_until

Load = Callable[..., Loaded]
BYTES = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of a megabyte, of which nobody else knows."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={BYTES}", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a filesystem of its own cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all the room that is left."""
    file = folder / "rest"
    with file.open("wb", buffering=0) as stream:
        try:
            while stream.write(bytes(4096)):
                pass
        except OSError:
            pass
    return file


def logged(load: Load, folder: Path) -> tuple[Decided, Callable[[Any], Engine]]:
    """A decision log with a part for every five decisions, and the engine that tells it."""
    decided = Decided(DecisionLog(folder, share=1.0, flush_rows=5, flush_seconds=0.2))

    def make(settings: Any) -> Engine:
        engine = Engine(Switch(v1=load), settings, on_answer=decided)
        decided.start(engine.metrics)
        return engine

    return decided, make


def test_decisions_that_find_no_room_are_dropped_and_counted(load: Load, disk: Path) -> None:
    decided, make = logged(load, disk / "decisions")
    with served(None, engine=make, closing=(decided.close,)) as server, server.loses_nothing(POOLS):
        wait_until(lambda: decided.log.written > 0)
        rest = fill(disk)
        for user in KNOWN[:20]:
            assert server.is_whole(user)
        wait_until(lambda: decided.log.dropped >= 20)
        assert server.is_whole()
        wait_until(lambda: server.count("recsys_dropped_decisions_total") >= 20)
        rest.unlink()
        dropped, written = decided.log.dropped, decided.log.written
        for user in KNOWN[:5]:
            assert server.is_whole(user)
        wait_until(lambda: decided.log.written > written)
        assert decided.log.dropped == dropped, "there is room again"
    assert len(list(read_decisions(disk / "decisions"))) == decided.log.written
    assert not list((disk / "decisions").glob(".*")), "nothing half-written stays"


@pytest.mark.slow
def test_events_that_cannot_be_written_are_refused_and_sent_again(tiny_run: Any, tmp_path: Path, disk: Path) -> None:
    home = own_home(tiny_run.home, tmp_path)
    shutil.copytree(home / "online", disk / "online")
    shutil.rmtree(home / "online")
    (home / "online").symlink_to(disk / "online")
    source = RegistrySource("models:/recsys@champion", registry_of(home).location, Hosting(events="store"))
    with served(source) as server, server.loses_nothing(POOLS):
        rest = fill(disk)
        refused = [post_event(server, n) for n in range(200)]
        assert set(refused) <= {200, 503} and 503 in refused
        assert server.is_whole()
        rest.unlink()
        again = [post_event(server, n) for n in range(200)]
        assert again == [200] * 200


def post_event(server: Server, number: int) -> int:
    body = {"event_id": f"e{number}", "user_id": "somebody", "item_id": "1", "time": "2026-01-01T12:00:00Z", "values": {"rating": 5}}
    return httpx.post(server.address + "/v1/events", json=body, timeout=60, trust_env=False).status_code


def test_a_full_disk_is_one(disk: Path) -> None:
    """The oracle of this file."""
    fill(disk)
    with pytest.raises(OSError, match="No space left"):
        (disk / "one more").write_bytes(bytes(8192))
    with pytest.raises(FeatureStoreError):
        SQLiteStore(SQLiteStore.Config(path=disk / "store.sqlite"))
