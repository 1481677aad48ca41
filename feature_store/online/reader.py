# SPDX-License-Identifier: Apache-2.0
"""Reading features from an online store."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from feature_store.compiled import CompiledView, compile_view
from feature_store.definitions import FeatureRepo
from feature_store.log import Log
from feature_store.online.base import FeatureStoreError, OnlineStore, Snapshot
from feature_store.online.packing import unpack
from feature_store.point_in_time import read_features
from feature_store.tiles import Tiles


class OnlineReader:
    """Reads features from what was materialised.

    The store holds every event of an entity, so a time in the past is answered as well as the present; except of views with tiles, whose
    values have the status ERROR before the moment from which on all stored events of the entity count.

    Args:
        repo: the definitions; the store must hold just these versions of them.
        store: where they were materialised to.
    """

    def __init__(self, repo: FeatureRepo, store: OnlineStore) -> None:
        self._repo = repo
        self._store = store
        self._views = {view.name: compile_view(repo, view.name) for view in repo.views}

    def read(self, service: str, spine: pa.Table, *, tokenizer: str | None = None) -> pa.Table:
        """See `feature_store.offline.OfflineReader.read`. One snapshot, and one round trip for all views that are stored.

        Raises:
            ConfigError: there is no such service, or its histories are codes of another tokenizer.
            FeatureStoreError: the store cannot be read, or holds other versions of the service's views.
            SchemaError: a column of the spine is absent or of another type.
        """
        if tokenizer is not None:
            self._repo.check_tokenizer(service, tokenizer)
        return read_features(tuple(self._views[name] for name in self._repo.service(service).views), spine, self._logs)

    def _logs(self, views: tuple[CompiledView, ...], keys: pa.Array) -> list[Log | Tiles]:
        with self._store.snapshot() as snapshot:
            stored = Stored(snapshot, views, keys)
            check_versions(views, snapshot)
        return stored.logs()


def check_versions(views: tuple[CompiledView, ...], snapshot: Snapshot) -> None:
    """Raise a `FeatureStoreError` unless the snapshot holds the views as they are defined."""
    states = snapshot.states()
    for view in views:
        name = view.view.name
        if name not in states:
            raise FeatureStoreError(f"view {name!r} is not in the online store; materialise it first")
        if states[name].version != view.version:
            raise FeatureStoreError(
                f"view {name!r}: the online store holds version {states[name].version[:12]}, but its definition is version "
                f"{view.version[:12]}; materialise it again"
            )


class Stored:
    """What a snapshot holds of some entities, read from it in one round trip; unpacked when it is asked for.

    Args:
        snapshot: of the store.
        views: of one entity.
        keys: string, without nulls, distinct.
    """

    def __init__(self, snapshot: Snapshot, views: Sequence[CompiledView], keys: pa.Array) -> None:
        entities = keys.to_pylist()
        self._views, self._keys = views, keys
        self._values = snapshot.multi_get({view.view.name: entities for view in views})

    def logs(self) -> list[Log | Tiles]:
        """Of each view the log, or the tiles, of the entities that are in the store.

        Raises:
            FeatureStoreError: a value is not the view's.
        """
        return [_log(view, self._keys, self._values[view.view.name]) for view in self._views]


def _log(view: CompiledView, keys: pa.Array, values: Sequence[bytes | None]) -> Log | Tiles:
    found = [value for value in values if value is not None]
    rows, offsets = unpack(found, view.stored)
    entities = keys.filter(pa.array(np.array([value is not None for value in values], bool)))
    return Log(entities, offsets, rows) if view.view.tile is None else Tiles.of_table(view, entities, offsets, rows)
