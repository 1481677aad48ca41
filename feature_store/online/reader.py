# SPDX-License-Identifier: Apache-2.0
"""Reading features from an online store."""

import numpy as np
import pyarrow as pa

from feature_store.compiled import CompiledView, compile_view
from feature_store.definitions import FeatureRepo
from feature_store.log import Log
from feature_store.online.base import FeatureStoreError, OnlineStore, Snapshot
from feature_store.online.packing import unpack
from feature_store.point_in_time import read_features


class OnlineReader:
    """Reads features from what was materialised.

    The store holds every event of an entity, so a time in the past is answered as well as the present.

    Args:
        repo: the definitions; the store must hold just these versions of them.
        store: where they were materialised to.
    """

    def __init__(self, repo: FeatureRepo, store: OnlineStore) -> None:
        self._repo = repo
        self._store = store
        self._views = {view.name: compile_view(repo, view.name) for view in repo.views}

    def read(self, service: str, spine: pa.Table) -> pa.Table:
        """See `feature_store.offline.OfflineReader.read`. One snapshot, and one round trip per view.

        Raises:
            ConfigError: there is no such service.
            FeatureStoreError: the store cannot be read, or holds other versions of the service's views.
            SchemaError: a column of the spine is absent or of another type.
        """
        views = tuple(self._views[name] for name in self._repo.service(service).views)
        with self._store.snapshot() as snapshot:
            check_versions(views, snapshot)
            return read_features(views, spine, lambda view, keys: fetch(snapshot, view, keys))


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


def fetch(snapshot: Snapshot, view: CompiledView, keys: pa.Array) -> Log:
    """The stored log of these entities, of which those that are not in the store are left out."""
    values = snapshot.multi_get(view.view.name, keys.to_pylist())
    found = [value for value in values if value is not None]
    rows, offsets = unpack(found, view.stored)
    return Log(keys.filter(pa.array(np.array([value is not None for value in values], bool))), offsets, rows)
