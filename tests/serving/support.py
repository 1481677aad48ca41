# SPDX-License-Identifier: Apache-2.0
"""A real engine, with faults between it and its real online store, and ways to ask it."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from recsys.core.deadline import Deadline
from recsys.core.errors import RegistryError
from recsys.inference.features import FeatureReader
from recsys.inference.request import Request
from serving.engine import Engine, Loaded, Target, Work
from serving.settings import Settings

NOW = datetime(2030, 1, 1, tzinfo=UTC)
KNOWN = [str(user) for user in range(0, 60, 2)]


class Faulty:
    """A reader of features that is slow, fails, or gives garbage when it is told to, and counts what it is asked."""

    def __init__(self, reader: FeatureReader) -> None:
        self.reader = reader
        self.reads: Counter[str] = Counter()
        self.heal()

    def heal(self) -> None:
        self.services = {"user", "seen", "item"}
        self.delay = 0.0
        self.error: Exception | None = None
        self.garbage: Callable[[pa.Table], Any] = lambda table: table

    def read(self, service: str, spine: pa.Table) -> pa.Table:
        self.reads[service] += 1
        if service not in self.services:
            return self.reader.read(service, spine)
        time.sleep(self.delay)
        if self.error is not None:
            raise self.error
        return self.garbage(self.reader.read(service, spine))


class Switch:
    """A source that names whichever version it is told to, of those that it can load."""

    def __init__(self, **loaders: Callable[[], Loaded]) -> None:
        self.loaders = {int(name.removeprefix("v")): load for name, load in loaders.items()}
        self.wanted = min(self.loaders, default=0)
        self.loads: Counter[int] = Counter()
        self.shas: dict[int, str] = {}

    def target(self) -> Target:
        if self.wanted not in self.loaders:
            raise RegistryError("models:/recsys@champion: not in the registry")
        return Target("recsys", self.wanted, self.shas.get(self.wanted, "not loaded yet"))

    def load(self, target: Target) -> Loaded:
        self.loads[target.version] += 1
        loaded = self.loaders[target.version]()
        self.shas[target.version] = loaded.sha256
        return loaded


def settings(**changed: Any) -> Settings:
    """Deadlines that no test meets on a busy machine, unless it asks for shorter ones; and no waiting where nothing is tested by it."""
    patient = {"recommend_deadline_ms": 30_000, "rank_deadline_ms": 30_000, "largest_deadline_ms": 60_000}
    quick = {"poll_seconds": 0.02, "retry_seconds": 0.05, "breaker_seconds": 0.2, "grace_seconds": 0.0, "model": "models:/recsys@champion"}
    return Settings(**(patient | quick | changed))


@contextmanager
def running(
    source: Any, *, ready: bool = True, on_answer: Any = None, keep_up: Any = None, lanes: Any = None, **changed: Any
) -> Iterator[Engine]:
    engine = Engine(source, settings(**changed), on_answer=on_answer, keep_up=keep_up, lanes=lanes)
    engine.start()
    try:
        if ready:
            wait_until(lambda: engine.loaded is not None)
        yield engine
    finally:
        engine.stop()


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "not in time"
        time.sleep(0.01)


def work(user: str, *, k: int = 5, seconds: float = 30.0, items: list[str] | None = None, explain: bool = False, name: str = "") -> Work:
    request = Request(user_id=user, k=k if items is None else len(items), at=NOW, explain=explain)
    return Work(request, Deadline.after(seconds), name or f"request of {user}", None if items is None else tuple(items))


def together(engine: Engine, works: list[Work]) -> list[Any]:
    """Answers or exceptions of requests that come at the same time."""

    async def ask() -> list[Any]:
        return await asyncio.gather(*(engine.answer(one) for one in works), return_exceptions=True)

    return asyncio.run(ask())


def one(engine: Engine, asked: Work) -> Any:
    """The answer to one request."""
    return asyncio.run(_awaited(engine.answer(asked)))


async def _awaited(answer: Coroutine[Any, Any, Any]) -> Any:
    return await answer
