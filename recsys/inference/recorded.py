# SPDX-License-Identifier: Apache-2.0
"""Features that were recorded, as the recommendation path reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from recsys.core.errors import DataError
from recsys.core.schema import REQUEST_TIME, TIME
from recsys.core.status import STATUS_SUFFIX, ValueStatus


class RecordedReader:
    """A `recsys.inference.features.FeatureReader` over rows that were recorded; what was not recorded is MISSING.

    Args:
        features: see `show`; by default nothing is recorded.
    """

    def __init__(self, features: Mapping[str, pa.Table] | None = None) -> None:
        self.show(features or {})

    def show(self, features: Mapping[str, pa.Table]) -> None:
        """Answer from these rows from now on.

        Args:
            features: for each service its rows, as a reader gave them: the key of the entity first, then values with their statuses. Where
                they hold the time of a request (`recsys.core.schema.REQUEST_TIME`), a row is of that time alone, else of any.
        """
        self._features = dict(features)
        self._keys = {service: _key_of(table) for service, table in self._features.items()}
        self._rows = {service: row_of(table) for service, table in self._features.items()}

    def read(self, service: str, spine: pa.Table) -> pa.Table:
        """See `recsys.inference.features.FeatureReader.read`.

        Raises:
            DataError: nothing was recorded of the service.
        """
        if service not in self._features:
            raise DataError(f"service {service!r}: recorded are {', '.join(sorted(self._features)) or 'none'}")
        rows = self._rows[service]
        found = self._features[service].take(pa.array([rows.get(key) for key in _values(spine, self._keys[service])], pa.int64()))
        for field in found.schema:
            if field.name in spine.column_names:
                continue
            column = found.column(field.name)
            if field.name.endswith(STATUS_SUFFIX):
                column = pc.fill_null(column, pa.scalar(int(ValueStatus.MISSING), field.type))
            spine = spine.append_column(field, column)
        return spine


def row_of(table: pa.Table) -> dict[tuple[Any, ...], int]:
    """By entity, and by time where a table has one: the row, which is the last one where there are several."""
    return {key: row for row, key in enumerate(_values(table, _key_of(table)))}


def _key_of(table: pa.Table) -> tuple[str, ...]:
    entity = next(name for name in table.column_names if name != REQUEST_TIME)
    return (entity, REQUEST_TIME) if REQUEST_TIME in table.column_names else (entity,)


def _values(table: pa.Table, names: Sequence[str]) -> list[tuple[Any, ...]]:
    columns = [table.column(name) for name in names]
    plain = [column.cast(TIME).cast(pa.int64()) if name == REQUEST_TIME else column for name, column in zip(names, columns, strict=True)]
    return list(zip(*(column.to_pylist() for column in plain), strict=True))
