# SPDX-License-Identifier: Apache-2.0
"""FS-8: the ten-thousandth identical request costs what the first did, and leaves nothing behind."""

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from feature_store.materialize import materialize
from feature_store.online import MemoryStore, OnlineReader, OnlineStore, SQLiteStore

REQUESTS = 10_000
WARM_UP = 100
FACTOR = 1.5
MOST_NEW_OBJECTS = 500


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> OnlineStore:
    return MemoryStore() if request.param == "memory" else SQLiteStore(SQLiteStore.Config(path=tmp_path / "s.sqlite"))


@pytest.mark.slow
def test_ten_thousand_identical_requests(world: Callable[..., Any], store: OnlineStore) -> None:
    w = world(0)
    materialize(w.repo, w.tables, store)
    reader, spine = OnlineReader(w.repo, store), w.spine("item", 5)
    expected = reader.read("item", spine)
    for _ in range(WARM_UP):
        reader.read("item", spine)
    gc.collect()
    before = len(gc.get_objects())
    taken = [_seconds(reader, spine) for _ in range(REQUESTS)]
    gc.collect()
    grown = len(gc.get_objects()) - before
    first, last = statistics.median(taken[: REQUESTS // 10]), statistics.median(taken[-REQUESTS // 10 :])
    assert last < FACTOR * first, (first, last)
    assert grown < MOST_NEW_OBJECTS  # one object for each request would be ten thousand
    assert reader.read("item", spine).equals(expected)


def _seconds(reader: OnlineReader, spine: Any) -> float:
    """Of this thread's processor time: what else the machine does meanwhile makes no slope. Reads never wait for anything else."""
    started = time.thread_time()
    reader.read("item", spine)
    return time.thread_time() - started
