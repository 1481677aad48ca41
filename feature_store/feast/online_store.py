# SPDX-License-Identifier: Apache-2.0
"""Feast's online store over one of ours.

.. code-block:: yaml

    online_store:
      type: feature_store.feast.online_store.RecsysOnlineStore
      store: {name: sqlite, path: data/online.db}      # or {name: redis, url: redis://host:6379/0}

All entities of a view are read in one round trip, and a batch is written in one transaction. A row replaces the one that is there unless
that is newer, and as a whole: a feature that a later row leaves out is no longer there.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from feast import Entity, FeatureView
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.online_store import OnlineStore as FeastOnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey as EntityKeyProto
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from feast.repo_config import FeastConfigBaseModel, RepoConfig

from feature_store.feast.rows import newest, pack_row, unpack_row
from feature_store.online.base import OnlineStore, ViewState
from recsys.core import components
from recsys.core.components import component_config

Row = tuple[EntityKeyProto, dict[str, ValueProto], datetime, datetime | None]
VERSION = "feast 1"
"""What `ViewState` says of a view that Feast wrote: such values are none of our own readers'."""


class RecsysOnlineStoreConfig(FeastConfigBaseModel):
    """The section ``online_store`` of ``feature_store.yaml``.

    Attributes:
        type: the path of the class.
        store: the configuration of one of our online stores; a relative ``path`` begins at the repository of Feast.
    """

    type: Literal["feature_store.feast.online_store.RecsysOnlineStore"] = "feature_store.feast.online_store.RecsysOnlineStore"
    store: component_config("online_store")  # type: ignore[valid-type]


class RecsysOnlineStore(FeastOnlineStore):
    """See the module.

    Raises:
        FeatureStoreError: from every method, where the store cannot be read or written.
    """

    def __init__(self) -> None:
        super().__init__()
        self._opened: OnlineStore | None = None

    def online_write_batch(self, config: RepoConfig, table: FeatureView, data: list[Row], progress: Callable[[int], Any] | None) -> None:
        """Write rows; of several of one entity, and of the one that is there, the newest stays."""
        view, rows = _view(config, table), list(zip(_entities(config, [key for key, *_ in data]), data, strict=True))
        given: dict[str, list[bytes]] = {}
        for entity, (_, values, event, created) in rows:
            given.setdefault(entity, []).append(pack_row(values, event, created))
        with self._store(config).transaction() as transaction:
            stored = transaction.multi_get({view: list(given)})[view]
            there = ([] if value is None else [value] for value in stored)
            transaction.write(view, {entity: newest([*old, *new]) for old, (entity, new) in zip(there, given.items(), strict=True)})
            transaction.set_state(view, ViewState(VERSION, None))
        if progress is not None:
            progress(len(data))

    def online_read(
        self, config: RepoConfig, table: FeatureView, entity_keys: list[EntityKeyProto], requested_features: list[str] | None = None
    ) -> list[tuple[datetime | None, dict[str, ValueProto] | None]]:
        """The event time and the values of each entity, in order; None twice where there is no row."""
        view = _view(config, table)
        with self._store(config).snapshot() as snapshot:
            values = snapshot.multi_get({view: _entities(config, entity_keys)})[view]
        return [(None, None) if value is None else _requested(unpack_row(value), requested_features) for value in values]

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Remove the rows of views that are no more; a new view needs nothing before its first row."""
        self._clear(config, tables_to_delete)

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Remove the rows of all views; what others keep in the same store stays."""
        self._clear(config, tables)
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _clear(self, config: RepoConfig, tables: Sequence[FeatureView]) -> None:
        if tables:
            with self._store(config).transaction() as transaction:
                for table in tables:
                    transaction.clear(_view(config, table))

    def _store(self, config: RepoConfig) -> OnlineStore:
        if self._opened is None:
            settings = config.online_store.store
            path = getattr(settings, "path", None)
            if path is not None and config.repo_path is not None:
                settings = settings.model_copy(update={"path": Path(config.repo_path) / path})
            self._opened = components.build("online_store", settings)
        return self._opened


def _view(config: RepoConfig, table: FeatureView) -> str:
    """The name of a Feast view in our store, where views of ours have no such one."""
    return f"feast:{config.project}:{table.name}"


def _entities(config: RepoConfig, keys: Sequence[EntityKeyProto]) -> list[str]:
    version = config.entity_key_serialization_version
    return [serialize_entity_key(key, entity_key_serialization_version=version).hex() for key in keys]


def _requested(row: tuple[datetime, dict[str, ValueProto]], features: list[str] | None) -> tuple[datetime, dict[str, ValueProto]]:
    event, values = row
    return event, values if features is None else {name: values[name] for name in features if name in values}
