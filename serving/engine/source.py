# SPDX-License-Identifier: Apache-2.0
"""Where bundles come from: which one ought to answer, asked often, and how it is loaded."""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

import pyarrow as pa

from feature_store.definitions import FeatureRepo
from feature_store.online import OnlineReader, OnlineStore, SQLiteStore
from recsys.core.config import parse
from recsys.core.errors import RegistryError
from recsys.core.schema import TIME
from recsys.core.tombstones import Tombstones
from recsys.inference.compiled import compile_ranker
from recsys.inference.frame import USER_SERVICE
from recsys.inference.request import InvalidRequest
from recsys.ranking.mixers import fold_mixing
from recsys.registry import Location, Registry
from serving.engine.loaded import Loaded
from serving.engine.verify import NOBODY
from serving.events import Events, EventViews, Held, HeldEvents, StoredEvents
from serving.overlaid import OverlaidStore

log = logging.getLogger("serving")

# MLflow is asked once for a bundle. Connections that it kept meanwhile would go on reading a database that was replaced by a restored one.
os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")

_SAMPLE = 3
_FOLLOWED = re.compile(r"^models:/(?P<model>[^/@]+)@champion$")


@dataclass(frozen=True)
class Target:
    """The bundle that ought to answer."""

    name: str
    version: int
    sha256: str

    @property
    def key(self) -> tuple[int, str]:
        """See `Loaded.key`."""
        return self.version, self.sha256


class Source(Protocol):
    """What the engine follows."""

    def target(self) -> Target:
        """Which bundle ought to answer now. Cheap: it is asked every second.

        Raises:
            RecsysError: there is none.
        """
        ...

    def load(self, target: Target) -> Loaded:
        """Load it, verified. May take long; is called on a thread of its own.

        Raises:
            RecsysError: the registry refuses it, or its features were not materialised.
        """
        ...


@dataclass(frozen=True)
class Hosting:
    """How a process keeps the bundles that it serves.

    Attributes:
        mmap: see `recsys.bundle.bundle.Bundle.load`.
        quantize: likewise.
        compile: whether a compiled ranker answers, where it agrees with the bundle's (`Recommender.adopt`).
        remembered_users: see `Loaded.of`.
        events: where new events go: nowhere, into the memory of this process, or to the online store.
        held_events: how many are held in memory.
    """

    mmap: bool = False
    quantize: Literal["int8"] | None = None
    compile: bool = False
    remembered_users: int = 10_000
    events: Literal["off", "held", "store"] = "off"
    held_events: int = 100_000


_PLAIN = Hosting()


class RegistrySource:
    """Bundles of a registry: of the champion, the promotion log is followed; any other address is what it was at first.

    Args:
        uri: ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.
        location: of the registry.
        hosting: how bundles are kept here.
    """

    def __init__(self, uri: str, location: Location, hosting: Hosting = _PLAIN) -> None:
        self._uri, self._location, self._hosting = uri, location, hosting
        self._registry: Registry | None = None
        self._fixed: Target | None = None
        # Not a bundle's: what happened since the batch road last ran counts for the next bundle as well.
        self._held = Held(hosting.held_events)

    def target(self) -> Target:
        """See `Source.target`."""
        if followed := _FOLLOWED.match(self._uri):
            event = self._opened().log.champion(followed["model"])
            if event is None:
                raise RegistryError(f"{self._uri}: the promotion log knows no champion")
            return Target(event.model, event.to_version, event.sha256)
        if self._fixed is None:
            self._fixed = Target(*self._opened().resolve(self._uri))
        return self._fixed

    @property
    def followed(self) -> str | None:
        """The model whose champion is followed; None where the address is of one version."""
        found = _FOLLOWED.match(self._uri)
        return None if found is None else found["model"]

    @property
    def registry(self) -> Registry:
        """Where the bundles come from.

        Raises:
            RegistryError: it is not there yet.
        """
        return self._opened()

    def load(self, target: Target) -> Loaded:
        """See `Source.load`. Mixing matrices that depend on parameters alone are computed here, once."""
        address, hosting = f"models:/{target.name}/{target.version}", self._hosting
        bundle, version = self._opened().load(address, mmap=hosting.mmap, quantize=hosting.quantize)
        if bundle.manifest.sha256 != target.sha256:
            raise RegistryError(f"{self._uri}: version {version} has sha256 {bundle.manifest.sha256}, expected {target.sha256}: refused")
        fold_mixing(bundle.ranker)
        repo = parse(FeatureRepo, bundle.features, source="features.json")
        store = SQLiteStore.open(path := self._location.online_store(bundle.manifest.feature_versions))
        read, events, close = self._events(repo, store, path)
        loaded = Loaded.of(
            bundle,
            OnlineReader(repo, read),
            name=target.name,
            version=version,
            sample=_some_users(repo, store),
            remembered_users=hosting.remembered_users,
            close=close,
            events=events,
        )
        if hosting.compile:
            _compile(loaded, self._location.compiled / bundle.manifest.sha256)
        return loaded

    def _events(self, repo: FeatureRepo, store: SQLiteStore, path: Path) -> tuple[OnlineStore, Events | None, Callable[[], None]]:
        """The store as it is read, where events go, and how all of it is closed."""
        if self._hosting.events == "off":
            return store, None, store.close
        try:
            views = EventViews(repo)
        except InvalidRequest as error:
            log.warning("no events are taken: %s", error)
            return store, None, store.close
        if self._hosting.events == "held":
            return OverlaidStore(store, views, self._held), HeldEvents(views, self._held, self._forgotten), store.close
        written = SQLiteStore(SQLiteStore.Config(path=path))

        def close() -> None:
            store.close()
            written.close()

        return store, StoredEvents(repo, written, self._forgotten), close

    def _forgotten(self) -> Tombstones:
        """As the file has them now: users are forgotten while the server runs."""
        return Tombstones.under(self._location.online.parent)

    def _opened(self) -> Registry:
        """The registry, opened when it is there."""
        if self._registry is None:
            self._registry = Registry(self._location)
        return self._registry


def _compile(loaded: Loaded, cache: Path) -> None:
    """Let a compiled ranker answer, if there is one and it agrees with the bundle's on the lists of some users."""
    compiled = compile_ranker(loaded.recommender.bundle, cache)
    if compiled is None:
        return
    asked = loaded.sample or (NOBODY,)
    users = loaded.recommender.users(asked, pa.array([datetime.now(UTC)] * len(asked), TIME))
    parity = loaded.recommender.adopt(compiled, users)
    loaded.remembered.ranker = loaded.recommender.ranker
    log.info("%s version %d: compiled ranker: %s", loaded.name, loaded.version, parity.reason or "in use")


def _some_users(repo: FeatureRepo, store: OnlineStore) -> list[str]:
    """A few users that have events."""
    views = [repo.view(name) for name in repo.service(USER_SERVICE).views]
    for view in views:
        if repo.source(view.source).kind == "events":
            with store.snapshot() as snapshot:
                return [user for user, _ in islice(snapshot.scan(view.name), _SAMPLE)]
    return []
