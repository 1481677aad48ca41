# SPDX-License-Identifier: Apache-2.0
"""What is to be done for a join that does not fit in memory: checked before any data is read, and told to every task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
from pydantic import Field, PositiveInt

from feature_store.compiled import CompiledView, compile_view
from feature_store.definitions import FeatureRepo
from feature_store.offline import OfflineReader
from recsys.core.config import Config
from recsys.core.errors import ConfigError, DataError, SchemaError, unknown
from recsys.core.scatter import CHUNK_ROWS, MAX_PARTS, schema_of
from recsys.core.schema import REQUEST_TIME
from recsys.core.workspace import stamps

ROW, DESTINATION = "__row", "__part"


class JoinConfig(Config):
    """How a large join is cut; of these only ``partitions`` and ``order`` decide in which file a row stands, and none its features.

    Attributes:
        partitions: P, into how many parts the entities of each type are divided.
        order: of the result. ``partition``: part p holds the rows whose key of the first service's entity belongs there, in the order of
            the spine. ``spine``: part p holds the rows from ``p * rows / P`` on, so that the parts one after another are in its order.
        chunk_rows: how many rows of a source are scattered at once.
        slice_rows: of how many rows of a part features are made at once.
        row_group: how many rows a row group of the result has at most.
        ignore_available_time: see `OfflineReader`.
    """

    partitions: int = Field(64, ge=1, le=MAX_PARTS)
    order: Literal["partition", "spine"] = "partition"
    chunk_rows: PositiveInt = CHUNK_ROWS
    slice_rows: PositiveInt = 1 << 18
    row_group: PositiveInt = 1 << 16
    ignore_available_time: bool = False


class Group(Config):
    """The services of one entity type.

    Attributes:
        entity: its key.
        services: what is read of it.
        tables: the tables that they read, each with the columns that are needed of it.
        spine: the columns that are needed of the spine.
    """

    entity: str
    services: tuple[str, ...]
    tables: dict[str, tuple[str, ...]]
    spine: tuple[str, ...]


class Plan(Config):
    """A join, as every task of it is told.

    Attributes:
        repo: the definitions.
        config: how it is cut.
        groups: the entity types; the first is that of the first service, and carries the columns of the spine.
        tables: the sources' files by their tables' names.
        spine: the spine's file or folder.
        rows: how many rows the spine has.
        columns: of the result, in order.
        sources: what tells whether a file is still the same, see `recsys.core.workspace.stamps`.
    """

    repo: FeatureRepo
    config: JoinConfig
    groups: tuple[Group, ...]
    tables: dict[str, str]
    spine: str
    rows: int
    columns: tuple[str, ...]
    sources: list[Any]

    @property
    def carries_last(self) -> bool:
        """Whether the last stage reads the features of the first group itself: its parts are then those of the result."""
        return self.config.order == "partition"

    @classmethod
    def make(
        cls, repo: FeatureRepo, tables: Mapping[str, Path], services: Sequence[str], spine: Path, config: JoinConfig, rows: int
    ) -> Self:
        """Check everything that can be checked without the data.

        Raises:
            ConfigError: there is no such service, or two of them share a view.
            DataError: a table was not given, or cannot be read.
            SchemaError: a column is absent or of another type, or has the name of a feature.
        """
        _check_services(repo, services)
        of_spine = schema_of(spine)
        used: dict[str, Path] = {}
        groups = []
        for entity in dict.fromkeys(repo.entity(service) for service in services):
            mine = tuple(service for service in services if repo.entity(service) == entity)
            views = [compile_view(repo, name) for service in mine for name in repo.service(service).views]
            needed = _needed(views)
            for name in needed:
                if name not in tables:
                    raise DataError(f"feature services {', '.join(mine)}: {unknown('table', name, tables)}")
                used[name] = tables[name].resolve()
            groups.append(Group(entity=entity, services=mine, tables=needed, spine=_of_spine(entity, views, of_spine.names)))
        columns = _columns(repo, used, services, of_spine)
        return cls(
            repo=repo,
            config=config,
            groups=(groups[0].model_copy(update={"spine": tuple(of_spine.names)}), *groups[1:]),
            tables={name: str(path) for name, path in used.items()},
            spine=str(spine.resolve()),
            rows=rows,
            columns=columns,
            sources=[stamps(path) for path in (spine.resolve(), *used.values())],
        )


def _check_services(repo: FeatureRepo, services: Sequence[str]) -> None:
    if not services:
        raise ConfigError("services: expected at least one feature service, got none")
    views = [name for service in services for name in repo.service(service).views]
    for name in views:
        if views.count(name) > 1:
            raise ConfigError(f"services: view {name!r} is read by several of {', '.join(services)}; each of its features is one column")


def _needed(views: Sequence[CompiledView]) -> dict[str, tuple[str, ...]]:
    """The columns that views read of each table."""
    columns: dict[str, dict[str, None]] = {}
    for view in views:
        if view.source.table is not None:
            columns.setdefault(view.source.table, {}).update(dict.fromkeys(view.columns.names()))
    return {table: tuple(names) for table, names in columns.items()}


def _of_spine(entity: str, views: Sequence[CompiledView], present: Sequence[str]) -> tuple[str, ...]:
    asked = [name for view in views if view.is_request for name in view.columns.names() if name in present]
    return tuple(dict.fromkeys([entity, REQUEST_TIME, *asked]))


def _columns(repo: FeatureRepo, tables: Mapping[str, Path], services: Sequence[str], spine: pa.Schema) -> tuple[str, ...]:
    """The columns of the result, found by reading no rows: what is wrong with a column is told here."""
    for name in (ROW, DESTINATION):
        if name in spine.names:
            raise SchemaError(f"spine: column {name!r}: the name is needed; rename it")
    reader = OfflineReader(repo, {name: schema_of(path).empty_table() for name, path in tables.items()})
    read = [reader.read(service, spine.empty_table()) for service in services]
    return (*spine.names, *(name for table in read for name in table.column_names[len(spine.names) :]))
