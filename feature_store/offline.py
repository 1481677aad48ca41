# SPDX-License-Identifier: Apache-2.0
"""Reading features as of any point in time, straight from the tables of the sources."""

import logging
from collections.abc import Mapping

import pyarrow as pa

from feature_store.compiled import CompiledView, compile_view
from feature_store.definitions import FeatureRepo
from feature_store.log import Log, build_log, read_rows
from feature_store.point_in_time import read_features
from recsys.core.delta import DeltaVersion
from recsys.core.errors import DataError, unknown
from recsys.core.schema import AVAILABLE_TIME, EVENT_TIME

log = logging.getLogger(__name__)

SourceTables = Mapping[str, pa.Table | DeltaVersion]
"""The sources' tables by their names: in memory, or a version of a Delta table, of which a view's columns are read when they are needed."""


class OfflineReader:
    """Reads features from whole tables; the log of a view is built when the view is first read, and kept.

    Args:
        repo: the definitions.
        tables: see `SourceTables`.
        ignore_available_time: let an event count from its event time on, though it was not available yet: for tables whose available
            times say when a history was loaded, not when its events were known. A warning says so.
    """

    def __init__(self, repo: FeatureRepo, tables: SourceTables, *, ignore_available_time: bool = False) -> None:
        if ignore_available_time:
            log.warning(
                "features are read with ignore_available_time: an event counts from its event_time on, also where it became available "
                "later, so they may hold what no request could have known, and differ from those online"
            )
        self._repo = repo
        self._tables = tables
        self._ignore_available_time = ignore_available_time
        self._views = {view.name: compile_view(repo, view.name) for view in repo.views}
        self._logs: dict[str, Log] = {}

    def read(self, service: str, spine: pa.Table, *, tokenizer: str | None = None) -> pa.Table:
        """The features of ``service`` for each row of ``spine``, as known at the row's ``request_time``.

        Args:
            service: the name of a feature service.
            spine: the columns of the service's entity key (string) and ``request_time``, in any order, with repetitions; naive times
                are taken as UTC. Further columns are kept, and are what features of the request are made of.
            tokenizer: the fingerprint of the item tokenizer that the asking model reads codes of; None where it reads none.

        Returns:
            The rows of ``spine``, in the same order, with two more columns for each feature f: ``f`` and ``f__status`` (uint8, a
            `ValueStatus`). A value whose status is not PRESENT is null.

        Raises:
            ConfigError: there is no such service, or its histories are codes of another tokenizer.
            DataError: a table was not given, or breaks a rule of its source.
            SchemaError: a column of a table or of the spine is absent or of another type.
        """
        if tokenizer is not None:
            self._repo.check_tokenizer(service, tokenizer)
        views = tuple(self._views[name] for name in self._repo.service(service).views)
        return read_features(views, spine, lambda stored, _: [self._log(view) for view in stored])

    def _log(self, view: CompiledView) -> Log:
        name = view.view.name
        if name not in self._logs:
            rows = read_rows(view, source_table(view, self._tables))
            if self._ignore_available_time and not view.is_static:
                rows = rows.set_column(rows.schema.get_field_index(AVAILABLE_TIME), AVAILABLE_TIME, rows.column(EVENT_TIME))
            self._logs[name] = build_log(view, rows)
        return self._logs[name]


def source_table(view: CompiledView, tables: SourceTables, *, above: int | None = None, besides: tuple[str, ...] = ()) -> pa.Table:
    """The table of a view's source; `DataError` with the nearest name where it was not given.

    Args:
        view: whose columns are needed.
        tables: see `SourceTables`.
        above: rows whose ``ingest_seq`` is not greater are not needed; a table in memory gives them nonetheless.
        besides: further columns that are needed, where the table has them.
    """
    name = view.source.table
    assert name is not None  # only a request has none, and nothing reads its table
    if name not in tables:
        raise DataError(f"source {view.source.name!r}: {unknown('table', name, tables)}")
    table = tables[name]
    if not isinstance(table, DeltaVersion):
        return table
    wanted = view.columns.names()
    further = set(besides).intersection(table.schema.names).difference(wanted)
    return table.read([*wanted, *sorted(further)], above=above)
