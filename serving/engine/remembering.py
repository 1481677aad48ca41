# SPDX-License-Identifier: Apache-2.0
"""A reader that checks what a store gives, and remembers each user's last features for when it gives nothing."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from feature_store.online.base import FeatureStoreError
from recsys.core.schema import REQUEST_TIME, USER
from recsys.inference.features import FeatureReader
from recsys.inference.frame import SEEN_SERVICE, USER_SERVICE
from serving.engine.cache import LRU


@dataclass(frozen=True)
class _Row:
    """One row of a table that was read; the table is kept whole, so that remembering copies nothing."""

    table: pa.Table
    place: int
    read_at: float


class Memory:
    """The last features of users, by service; a `FeatureReader` of those who are `known`.

    Args:
        capacity: users of each service.
        clock: monotonic seconds.
    """

    def __init__(self, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rows: dict[str, LRU[str, _Row]] = {service: LRU(capacity) for service in (USER_SERVICE, SEEN_SERVICE)}
        self._clock = clock

    def keep(self, service: str, table: pa.Table) -> None:
        """Remember every row of what was read; of services of users alone."""
        if service in self._rows:
            now = self._clock()
            for place, user in enumerate(table.column(USER).to_pylist()):
                self._rows[service].put(user, _Row(table, place, now))

    def age(self, user: str) -> float | None:
        """Seconds since the features of a user were read, the oldest of them; None where not all are known."""
        found = [rows.get(user) for rows in self._rows.values()]
        return None if None in found else self._clock() - min(row.read_at for row in found if row is not None)

    def newest(self, count: int) -> list[str]:
        """Users that were read last, the newest first."""
        return self._rows[USER_SERVICE].newest(count)

    def read(self, service: str, spine: pa.Table) -> pa.Table:
        """See `recsys.inference.features.FeatureReader.read`: values as they were read last, whenever that was.

        Raises:
            FeatureStoreError: a user is not known.
        """
        pieces = []
        for user in spine.column(USER).to_pylist():
            row = self._rows[service].get(user) if service in self._rows else None
            if row is None:
                raise FeatureStoreError(f"service {service!r}: the features of a user are not remembered")
            pieces.append(row.table.slice(row.place, 1))
        table = pa.concat_tables(pieces)
        return table.set_column(table.schema.get_field_index(REQUEST_TIME), REQUEST_TIME, spine.column(REQUEST_TIME))


class RememberingReader:
    """Reads as ``reader`` does, refuses what is no answer to what was asked, and keeps users' features in ``memory``.

    What the first read of a service looks like, all others must: it is made while the bundle is loaded and verified.
    """

    def __init__(self, reader: FeatureReader, memory: Memory) -> None:
        self.memory = memory
        self._reader = reader
        self._columns: dict[str, dict[str, pa.DataType]] = {}

    def read(self, service: str, spine: pa.Table) -> pa.Table:
        """See `recsys.inference.features.FeatureReader.read`.

        Raises:
            FeatureStoreError: the store has other rows or columns than were asked for.
        """
        table = self._reader.read(service, spine)
        self._check(service, spine, table)
        self.memory.keep(service, table)
        return table

    def _check(self, service: str, spine: pa.Table, table: pa.Table) -> None:
        if not isinstance(table, pa.Table) or table.num_rows != spine.num_rows:
            got = table.num_rows if isinstance(table, pa.Table) else type(table).__name__
            raise FeatureStoreError(f"service {service!r}: expected {spine.num_rows} rows, got {got}")
        columns = {field.name: field.type for field in table.schema}
        expected = self._columns.setdefault(service, columns)
        if columns != expected:
            wrong = sorted(name for name in columns.keys() | expected.keys() if columns.get(name) != expected.get(name))[0]
            raise FeatureStoreError(f"service {service!r}: column {wrong!r}: expected {expected.get(wrong)}, got {columns.get(wrong)}")
        for name in spine.column_names:
            if not table.column(name).equals(spine.column(name)):
                raise FeatureStoreError(f"service {service!r}: column {name!r} is not the one that was asked with")
