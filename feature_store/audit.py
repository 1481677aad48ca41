# SPDX-License-Identifier: Apache-2.0
"""Was served what should have been? Every row of a served log beside the same features, read offline as of its request time.

An event that was available at the request but not yet in the online store is a difference: the request did not know what the training
row of the same moment knows.
"""

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.comparing import Compared, compare
from feature_store.definitions import FeatureRepo
from feature_store.offline import OfflineReader, SourceTables
from feature_store.served import ENTITY, PART, REQUEST_PREFIX, SERVICE, VERSION, ServedColumns, read_served
from recsys.core.errors import DataError
from recsys.core.part_log import SUFFIX, part_files
from recsys.core.schema import REQUEST_TIME
from recsys.core.status import ValueStatus, status_column

ALERT = 0.005
DAY_US = 86_400_000_000


@dataclass(frozen=True)
class FeatureAudit:
    """How a feature was served. No row counts twice among ``mismatch``, ``missing``, ``extra`` and ``status``.

    Attributes:
        rows: how many were compared.
        mismatch: both PRESENT, and the values differ.
        missing: PRESENT offline, not as served.
        extra: PRESENT as served, not offline.
        status: PRESENT in neither, and the statuses differ.
        smape: of numbers, the mean over rows PRESENT in both of ``2 |a − b| / (|a| + |b|)``, from 0 to 2; None where there are none.
        edit_distance: of lists, the mean over the same rows of the edit distance over the longer length, from 0 to 1.
        largest: of numbers, the greatest ``|a − b|``.
        days: for each day (UTC, ISO) the share of its rows that were wrong.
    """

    service: str
    feature: str
    rows: int
    mismatch: int
    missing: int
    extra: int
    status: int
    smape: float | None
    edit_distance: float | None
    largest: float | None
    days: dict[str, float]

    @property
    def wrong(self) -> int:
        """Rows that differ in any way."""
        return self.mismatch + self.missing + self.extra + self.status

    @property
    def share(self) -> float:
        """``wrong`` over ``rows``; 0 without rows."""
        return self.wrong / self.rows if self.rows else 0.0


@dataclass(frozen=True)
class AuditReport:
    """What `audit` found.

    Attributes:
        files: how many parts were read.
        rows: how many rows were compared.
        other_versions: rows of services or versions that the repo does not define, which were not compared.
        alert: the share of wrong rows above which a feature is in `alarms`.
        features: every feature of every service that rows were compared of, in the order of the definitions.
    """

    files: int
    rows: int
    other_versions: int
    alert: float
    features: tuple[FeatureAudit, ...]

    @property
    def alarms(self) -> tuple[FeatureAudit, ...]:
        """The features whose share of wrong rows is above ``alert``, the worst first."""
        return tuple(sorted((f for f in self.features if f.share > self.alert), key=lambda f: -f.share))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        features = [asdict(feature) | {"wrong": feature.wrong, "share": feature.share} for feature in self.features]
        return asdict(self) | {"features": features, "alarms": [f"{f.service}.{f.feature}" for f in self.alarms]}


def audit(repo: FeatureRepo, tables: SourceTables, folder: Path, *, alert: float = ALERT) -> AuditReport:
    """Compare every row of the parts in ``folder`` with the features as of its request time, one part after another.

    Numbers that are not integers agree within ``1e-6 * max(1, |a|, |b|)``; all else agrees exactly.

    Args:
        repo: the definitions that were served.
        tables: see `SourceTables`; they must reach to the last request at least.
        folder: of a `feature_store.served.ServedLog`.
        alert: see `AuditReport`.

    Raises:
        DataError: there is no part, or one is damaged or not of a served log; names the file.
        SchemaError: a part lacks a column of its service's features, or has it with another type; names the file.
    """
    parts = part_files(folder)
    if not parts:
        raise DataError(f"{folder}: expected the parts (*{SUFFIX}) of a served log, found none")
    reader = OfflineReader(repo, tables)
    services = [ServedColumns.of(repo, service.name) for service in repo.services]
    tallies = {(each.service, column.name): _Tally() for each in services for column in each.features}
    total = compared = 0
    for path in parts:
        part = read_served(path)
        total += part.num_rows
        for columns in services:
            mine = pc.and_(pc.equal(part.column(SERVICE), columns.service), pc.equal(part.column(VERSION), columns.version))
            rows = part.filter(mine)
            if rows.num_rows:
                compared += rows.num_rows
                _compare(columns, rows, reader, tallies, path)
    features = tuple(tally.result(*key) for key, tally in tallies.items() if tally.rows)
    return AuditReport(len(parts), compared, total - compared, alert, features)


def _compare(columns: ServedColumns, rows: pa.Table, reader: OfflineReader, tallies: dict[tuple[str, str], "_Tally"], path: Path) -> None:
    served = columns.schema().conform(rows, what=f"{PART} {path}")
    spine = {columns.entity: rows.column(ENTITY), REQUEST_TIME: rows.column(REQUEST_TIME)}
    for column in columns.request:
        if REQUEST_PREFIX + column.name in rows.column_names:
            spine[column.name] = rows.column(REQUEST_PREFIX + column.name)
    offline = reader.read(columns.service, pa.table(spine))
    day = np.asarray(rows.column(REQUEST_TIME).cast(pa.int64())) // DAY_US
    for column in columns.features:
        one, other = _side(served, column.name), _side(offline, column.name)
        tallies[columns.service, column.name].add(one, other, day)


@dataclass(frozen=True)
class _Side:
    values: pa.Array
    status: np.ndarray
    present: np.ndarray


def _side(table: pa.Table, feature: str) -> _Side:
    """A feature's values, statuses, and where there is a value: one that is null is not PRESENT, whatever its status says."""
    values, status = table.column(feature).combine_chunks(), np.asarray(table.column(status_column(feature)).fill_null(ValueStatus.ERROR))
    return _Side(values, status, (status == ValueStatus.PRESENT) & np.asarray(values.is_valid()))


@dataclass
class _Tally:
    """What was found of one feature so far."""

    rows: int = 0
    mismatch: int = 0
    missing: int = 0
    extra: int = 0
    status: int = 0
    compared: Compared = field(default_factory=Compared)
    days: dict[int, list[int]] = field(default_factory=dict)

    def add(self, served: _Side, offline: _Side, day: np.ndarray) -> None:
        both = served.present & offline.present
        differs, found = compare(served.values.filter(pa.array(both)), offline.values.filter(pa.array(both)))
        wrong = np.zeros(len(both), bool)
        wrong[both] = differs
        missing, extra = offline.present & ~served.present, served.present & ~offline.present
        status = ~served.present & ~offline.present & (served.status != offline.status)
        self.rows += len(both)
        self.mismatch += int(differs.sum())
        self.missing += int(missing.sum())
        self.extra += int(extra.sum())
        self.status += int(status.sum())
        self.compared = self.compared + found
        for one in np.unique(day).tolist():
            counts = self.days.setdefault(one, [0, 0])
            counts[0] += int((day == one).sum())
            counts[1] += int(((wrong | missing | extra | status) & (day == one)).sum())

    def result(self, service: str, feature: str) -> FeatureAudit:
        days = {f"{datetime.fromtimestamp(86_400 * day, UTC):%Y-%m-%d}": wrong / rows for day, (rows, wrong) in sorted(self.days.items())}
        found = self.compared
        counts = (self.rows, self.mismatch, self.missing, self.extra, self.status)
        return FeatureAudit(service, feature, *counts, found.smape, found.edit_distance, found.largest, days)
