# SPDX-License-Identifier: Apache-2.0
"""The model behind the API: loaded once, off the event loop, and called by one thread."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

from feature_store.definitions import FeatureRepo
from feature_store.online import OnlineReader, SQLiteStore
from recsys.core.config import parse
from recsys.core.errors import RecsysError
from recsys.inference.recommender import Recommender
from recsys.inference.request import Request, Response
from recsys.ranking.mixers import fold_mixing
from recsys.registry import Location, Registry

log = logging.getLogger("serving")


@dataclass(frozen=True)
class Loaded:
    """A bundle that answers, and what its items are called."""

    recommender: Recommender
    name: str
    version: int
    sha256: str
    titles: dict[str, str]


def load(uri: str, location: Location) -> Loaded:
    """Load the bundle at ``uri`` with the online store of its features, and answer one request to warm it up.

    Mixing matrices that depend on parameters alone are computed here, once.

    Raises:
        RecsysError: the registry has no such bundle, refuses it, or its features were not materialised.
    """
    registry = Registry(location)
    name, version, _ = registry.resolve(uri)
    bundle, version = registry.load(uri)
    fold_mixing(bundle.ranker)
    repo = parse(FeatureRepo, bundle.features, source="features.json")
    store = SQLiteStore.open(location.online_store(bundle.manifest.feature_versions))
    recommender = Recommender(bundle, OnlineReader(repo, store))
    recommender.recommend([Request(user_id="warm-up", k=1, at=datetime.now(UTC), explain=True)])
    ids, titles = bundle.items.column("item_id").to_pylist(), bundle.items.column("title").to_pylist()
    return Loaded(recommender, name, version, bundle.manifest.sha256, dict(zip(ids, titles, strict=True)))


class QueueFull(Exception):
    """Too many requests are waiting."""


class Engine:
    """Loads in the background until it succeeds, then answers one request after another.

    Args:
        loader: what to load.
        retry_seconds: how long to wait after a failed attempt.
        max_waiting: how many requests may wait or be computed at one time; further ones are rejected at once.
    """

    def __init__(self, loader: Callable[[], Loaded], *, retry_seconds: float = 5.0, max_waiting: int = 64) -> None:
        self._loader = loader
        self._retry_seconds = retry_seconds
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._stopped = threading.Event()
        self.max_waiting = max_waiting
        self.waiting = 0
        self.loaded: Loaded | None = None
        self.problem = "the model is being loaded"

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._executor.submit(self._load)

    def stop(self) -> None:
        """Finish what is being computed, and take no more."""
        self._stopped.set()
        self._executor.shutdown(wait=True, cancel_futures=True)

    async def run(self, compute: Callable[[Recommender], Response], recommender: Recommender) -> Response:
        """Compute on the one model thread, in the order of arrival. Called on the event loop, which alone counts who waits.

        Raises:
            QueueFull: ``max_waiting`` requests are waiting or computed already.
        """
        if self.waiting >= self.max_waiting:
            raise QueueFull(f"{self.max_waiting} requests are waiting already")
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, compute, recommender)
        finally:
            self.waiting -= 1

    def _load(self) -> None:
        while not self._stopped.is_set():
            started = time.perf_counter()
            try:
                self.loaded = self._loader()
                log.info("loaded %s version %d in %.1f s", self.loaded.name, self.loaded.version, time.perf_counter() - started)
                return
            except RecsysError as error:
                self.problem = str(error)
                log.warning("not ready: %s; next attempt in %.0f s", error, self._retry_seconds)
            except Exception as error:
                self.problem = f"{type(error).__name__}: {error}"
                log.exception("not ready; next attempt in %.0f s", self._retry_seconds)
            self._stopped.wait(self._retry_seconds)
