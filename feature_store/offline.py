# SPDX-License-Identifier: Apache-2.0
"""Reading features as of any point in time, straight from the tables of the sources."""

from collections.abc import Mapping

import pyarrow as pa

from feature_store.compiled import CompiledView, compile_view
from feature_store.definitions import FeatureRepo
from feature_store.log import Log, build_log, read_rows
from feature_store.point_in_time import read_features
from recsys.core.errors import DataError, unknown


class OfflineReader:
    """Reads features from whole tables; the log of a view is built when the view is first read, and kept.

    Args:
        repo: the definitions.
        tables: the sources' tables by their names.
    """

    def __init__(self, repo: FeatureRepo, tables: Mapping[str, pa.Table]) -> None:
        self._repo = repo
        self._tables = tables
        self._views = {view.name: compile_view(repo, view.name) for view in repo.views}
        self._logs: dict[str, Log] = {}

    def read(self, service: str, spine: pa.Table) -> pa.Table:
        """The features of ``service`` for each row of ``spine``, as known at the row's ``request_time``.

        Args:
            service: the name of a feature service.
            spine: the columns of the service's entity key (string) and ``request_time``, in any order, with repetitions; naive times
                are taken as UTC. Further columns are kept.

        Returns:
            The rows of ``spine``, in the same order, with two more columns for each feature f: ``f`` and ``f__status`` (uint8, a
            `ValueStatus`). A value whose status is not PRESENT is null.

        Raises:
            ConfigError: there is no such service.
            DataError: a table was not given, or breaks a rule of its source.
            SchemaError: a column of a table or of the spine is absent or of another type.
        """
        views = tuple(self._views[name] for name in self._repo.service(service).views)
        return read_features(views, spine, lambda _: [self._log(view) for view in views])

    def _log(self, view: CompiledView) -> Log:
        name = view.view.name
        if name not in self._logs:
            self._logs[name] = build_log(view, read_rows(view, source_table(view, self._tables)))
        return self._logs[name]


def source_table(view: CompiledView, tables: Mapping[str, pa.Table]) -> pa.Table:
    """The table of a view's source; `DataError` with the nearest name where it was not given."""
    if view.source.table not in tables:
        raise DataError(f"source {view.source.name!r}: {unknown('table', view.source.table, tables)}")
    return tables[view.source.table]
