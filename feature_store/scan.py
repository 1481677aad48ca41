# SPDX-License-Identifier: Apache-2.0
"""The history of all entities without a list of them: the features of each one at each of its own event times."""

from collections.abc import Iterator
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc

from feature_store.compiled import compile_view
from feature_store.definitions import FeatureRepo
from feature_store.log import read_rows
from feature_store.offline import OfflineReader, SourceTables, source_table
from recsys.core.errors import ConfigError
from recsys.core.schema import EVENT_TIME, REQUEST_TIME, TIME

PIECE_ROWS = 1 << 16


def scan(
    repo: FeatureRepo,
    tables: SourceTables,
    service: str,
    start: datetime,
    end: datetime,
    *,
    rows: int = PIECE_ROWS,
) -> Iterator[pa.Table]:
    """The features of every entity of ``service`` at the time of each of its events in ``[start, end)``.

    An entity's events are those of all event sources of the service; several at one time are one row. What comes is what
    `OfflineReader.read` gives for a spine of these keys and times, ordered by both.

    Args:
        repo: the definitions.
        tables: see `SourceTables`.
        service: the name of a feature service.
        start: the first time that counts; naive times are taken as UTC.
        end: the first that does not.
        rows: how many a piece has at most, so that the features of all rows are never in memory together.

    Raises:
        ConfigError: there is no such service, none of its views is of events, or ``rows`` is not positive.
        DataError: a table was not given, or breaks a rule of its source.
        SchemaError: a column of a table is absent or of another type.
    """
    if rows < 1:
        raise ConfigError(f"scan: rows: expected at least 1, got {rows}")
    spine = _spine(repo, tables, service, start, end)
    reader = OfflineReader(repo, tables)
    return (reader.read(service, spine.slice(first, rows)) for first in range(0, spine.num_rows, rows))


def _spine(repo: FeatureRepo, tables: SourceTables, service: str, start: datetime, end: datetime) -> pa.Table:
    entity = repo.entity(service)
    views = {view.source.name: view for view in (compile_view(repo, name) for name in repo.service(service).views)}
    parts = []
    for view in views.values():
        if view.source.kind == "events":
            events = read_rows(view, source_table(view, tables)).select([entity, EVENT_TIME])
            time = events.column(EVENT_TIME)
            parts.append(events.filter(pc.and_(pc.greater_equal(time, pa.scalar(start, TIME)), pc.less(time, pa.scalar(end, TIME)))))
    if not parts:
        raise ConfigError(f"scan: feature service {service!r}: expected a view of events, for its entities have no times of their own")
    distinct = pa.concat_tables(parts).group_by([entity, EVENT_TIME]).aggregate([])
    return distinct.sort_by([(entity, "ascending"), (EVENT_TIME, "ascending")]).rename_columns([entity, REQUEST_TIME])
