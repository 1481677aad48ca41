# SPDX-License-Identifier: Apache-2.0
"""What was served, written down for an audit: a sample of keys, all requests of each, off the path that serves.

A part is a Parquet file of rows with the columns ``service``, ``service_version``, ``entity`` and ``request_time``, then
``request__c`` for each column c of the request that a feature is made of, then each feature and its status. The columns of another
service's features are null.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.compiled import compile_view
from feature_store.definitions import FeatureRepo
from recsys.core.errors import ConfigError
from recsys.core.hashing import is_sampled
from recsys.core.part_log import PartLog, read_part
from recsys.core.schema import REQUEST_TIME, TIME, Column, Dtype, FeatureSchema, Kind
from recsys.core.status import status_column

SERVICE, VERSION, ENTITY, REQUEST_PREFIX = "service", "service_version", "entity", "request__"
FORMAT_KEY, FORMAT = b"recsys.served", b"1"
PART = "served part"
_HEAD = FeatureSchema(
    columns=(
        Column(name=SERVICE, kind=Kind.CATEGORICAL),
        Column(name=VERSION, kind=Kind.CATEGORICAL),
        Column(name=ENTITY, kind=Kind.ID),
        Column(name=REQUEST_TIME, kind=Kind.TIME),
    )
)


@dataclass(frozen=True)
class ServedColumns:
    """The columns of one service's rows in a part.

    Attributes:
        version: of the service.
        entity: its key column.
        request: the columns of the request that its features are made of.
        features: its features.
    """

    service: str
    version: str
    entity: str
    request: tuple[Column, ...]
    features: tuple[Column, ...]

    @classmethod
    def of(cls, repo: FeatureRepo, service: str) -> "ServedColumns":
        """Those of a service; `ConfigError` where there is none of this name, or a feature has the name of a part's own column."""
        views = [compile_view(repo, name) for name in repo.service(service).views]
        request = {column.name: column for view in views if view.is_request for column in view.columns.columns}
        features = repo.schema(service).columns
        for column in features:
            if column.name in (SERVICE, VERSION, ENTITY) or column.name.startswith(REQUEST_PREFIX):
                raise ConfigError(f"feature {column.name!r} of service {service!r}: what was served has a column of this name; rename it")
        return cls(service, repo.version(service), repo.entity(service), tuple(request.values()), features)

    def schema(self) -> FeatureSchema:
        """Features and statuses."""
        pairs = ((column, Column(name=status_column(column.name), kind=Kind.DENSE, dtype=Dtype.INT)) for column in self.features)
        return FeatureSchema(columns=tuple(column for pair in pairs for column in pair))

    def rows(self, read: pa.Table) -> pa.Table:
        """Of what a reader gave, the columns of a part."""
        columns = {
            SERVICE: pa.repeat(self.service, read.num_rows),
            VERSION: pa.repeat(self.version, read.num_rows),
            ENTITY: read.column(self.entity).cast(pa.string()),
            REQUEST_TIME: read.column(REQUEST_TIME).cast(TIME),
        }
        for column in self.request:
            if column.name in read.column_names:
                columns[REQUEST_PREFIX + column.name] = read.column(column.name).cast(column.arrow)
        return pa.table(columns | {name: read.column(name) for name in self.schema().names()})


class ServedLog:
    """Writes a sample of what was served to a folder, one file for each flush, from a thread of its own.

    Whoever serves never waits: rows that find no room are dropped and counted, as are those whose file could not be written.

    Args:
        folder: where the parts go; it is made.
        repo: the definitions that are served.
        share: of the keys, between 0 and 1.
        capacity: how many rows may wait to be written.
        flush_rows: how many waiting rows make a file.
        flush_seconds: how long a row waits at most until its file is written.

    Raises:
        ConfigError: ``share`` is not between 0 and 1, or a feature has the name of a part's own column.
    """

    def __init__(
        self,
        folder: Path,
        repo: FeatureRepo,
        *,
        share: float = 0.01,
        capacity: int = 100_000,
        flush_rows: int = 20_000,
        flush_seconds: float = 60.0,
    ) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"served log: share: expected a number between 0 and 1, got {share}")
        self._columns = {service.name: ServedColumns.of(repo, service.name) for service in repo.services}
        self._repo, self._share = repo, share
        self._log: PartLog[tuple[ServedColumns, pa.Table]] = PartLog(
            folder, _table, name="served log", capacity=capacity, flush_rows=flush_rows, flush_seconds=flush_seconds
        )

    @property
    def written(self) -> int:
        """Rows in files."""
        return self._log.written

    @property
    def dropped(self) -> int:
        """Rows that were sampled and are in no file."""
        return self._log.dropped

    def offer(self, service: str, features: pa.Table) -> None:
        """Take the sampled rows of what a reader gave for ``service``; rows without a key or a time are left out. Returns at once.

        Raises:
            ConfigError: there is no such service.
        """
        columns = self._columns.get(service) or ServedColumns.of(self._repo, service)
        chosen = features.filter(self._chosen(features, columns.entity))
        if chosen.num_rows:
            self._log.offer((columns, chosen), chosen.num_rows)

    def close(self) -> None:
        """Write what waits, and take no more."""
        self._log.close()

    def _chosen(self, features: pa.Table, entity: str) -> pa.Array:
        keys = features.column(entity).cast(pa.string())
        of_key = {key: key is not None and is_sampled(key, self._share) for key in pc.unique(keys).to_pylist()}
        return pa.array(np.array([of_key[key] for key in keys.to_pylist()], bool) & np.asarray(pc.is_valid(features.column(REQUEST_TIME))))


class Reader(Protocol):
    """An offline or online reader of features."""

    def read(self, service: str, spine: pa.Table) -> pa.Table:
        """See `feature_store.offline.OfflineReader.read`."""
        ...


class LoggedReader:
    """Reads as ``reader`` does, and offers what it gave to a `ServedLog`."""

    def __init__(self, reader: Reader, served: ServedLog) -> None:
        self._reader = reader
        self._served = served

    def read(self, service: str, spine: pa.Table) -> pa.Table:
        """See `feature_store.offline.OfflineReader.read`."""
        features = self._reader.read(service, spine)
        self._served.offer(service, features)
        return features


def read_served(path: Path) -> pa.Table:
    """A part of a served log.

    Raises:
        DataError: it is damaged or something else; names the file.
        SchemaError: it lacks a column that every part has; names the file.
    """
    part = read_part(path, FORMAT_KEY, FORMAT, PART)
    _HEAD.conform(part, what=f"{PART} {path}")
    return part


def _table(taken: list[tuple[ServedColumns, pa.Table]]) -> pa.Table:
    table = pa.concat_tables([columns.rows(read) for columns, read in taken], promote_options="default")
    return table.replace_schema_metadata({FORMAT_KEY: FORMAT})
