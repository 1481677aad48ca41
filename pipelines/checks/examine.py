# SPDX-License-Identifier: Apache-2.0
"""Holding the events of a day against what is demanded of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from rich.console import Console
from rich.table import Table

from feature_store.drift import drift, summarize
from pipelines.checks.config import ColumnCheck, DataChecks
from recsys.core.errors import DataError
from recsys.core.schema import EVENT_TIME
from recsys.core.status import ValueStatus, status_column

KINDS = ("columns", "types", "ranges", "values", "nulls", "volume", "dropped", "drift", "day")

_TYPES: dict[str, Callable[[pa.DataType], bool]] = {
    "text": pt.is_string,
    "integer": pt.is_integer,
    "number": lambda of: pt.is_integer(of) or pt.is_floating(of),
    "time": pt.is_timestamp,
    "list": pt.is_list,
}
_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """One demand and what was found.

    Attributes:
        kind: one of `KINDS`.
        column: of the events; None for the day as a whole.
        value: what was found.
        bound: what was demanded.
        passed: whether it holds.
    """

    kind: str
    column: str | None
    value: str
    bound: str
    passed: bool

    def __str__(self) -> str:
        subject = self.kind if self.column is None else f"{self.kind} of {self.column!r}"
        return f"{subject}: {self.value}, expected {self.bound}"


@dataclass(frozen=True)
class CheckReport:
    """Everything that was demanded of a day.

    Attributes:
        partition: the day.
        events: how many it has.
        compared_with: the days before that it was compared with.
        findings: in the order of `KINDS`.
    """

    partition: str
    events: int
    compared_with: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The demands that do not hold."""
        return tuple(finding for finding in self.findings if not finding.passed)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        compared = list(self.compared_with)
        findings = [asdict(finding) for finding in self.findings]
        return {"partition": self.partition, "events": self.events, "compared_with": compared, "findings": findings}

    def table(self) -> str:
        """A small table for people."""
        grid = Table("check", "column", "found", "expected", "", box=None)
        for finding in self.findings:
            cells = (finding.kind, finding.column or "", finding.value, finding.bound, "ok" if finding.passed else "FAILED")
            grid.add_row(*cells)
        stream = StringIO()
        Console(file=stream, width=140).print(f"{self.partition}: {self.events:,} events", grid, markup=False)
        return stream.getvalue()

    def raise_failed(self) -> None:
        """Raise `ChecksFailed` where a demand does not hold."""
        if self.failed:
            raise ChecksFailed(self)


class ChecksFailed(DataError):
    """A day's events are not what is demanded; the message names every demand that does not hold.

    Attributes:
        report: of all demands.
    """

    def __init__(self, report: CheckReport) -> None:
        failed = "; ".join(map(str, report.failed))
        super().__init__(f"{report.partition}: {len(report.failed)} checks failed: {failed}")
        self.report = report


def examine(
    checks: DataChecks, partition: str, events: pa.Table, before: dict[str, pa.Table], *, dropped: float = 0.0, daily: bool = False
) -> CheckReport:
    """Hold a day's events against the checks.

    Args:
        checks: what is demanded.
        partition: the day.
        events: its canonical events.
        before: those of the days before it, the oldest first; volume and drift are compared with the last of them, and where there are
            none, nothing is.
        dropped: the share of the raw rows that ingest left out.
        daily: whether the partition is a day, so that every event has to lie in it.
    """
    kept = dict(list(before.items())[-checks.days :])
    found = [finding for name, check in checks.columns.items() for finding in _column(name, check, events)]
    found += [*_volume(checks, events.num_rows, [table.num_rows for table in kept.values()]), *_dropped(checks, dropped)]
    for name, check in checks.columns.items():
        found += _drift(name, check, events, list(kept.values()))
    if daily:
        found.append(_day(partition, events))
    found.sort(key=lambda finding: KINDS.index(finding.kind))
    return CheckReport(partition, events.num_rows, tuple(kept), tuple(found))


def _column(name: str, check: ColumnCheck, events: pa.Table) -> Iterator[Finding]:
    there = name in events.column_names
    yield Finding("columns", name, "there" if there else f"the columns are {', '.join(events.column_names)}", "there", there)
    if not there:
        return
    column = events.column(name)
    right = check.type is None or _TYPES[check.type](column.type)
    if check.type is not None:
        yield Finding("types", name, str(column.type), check.type, right)
    if not right:
        return
    if check.low is not None or check.high is not None:
        yield _range(name, check, column)
    if check.values is not None:
        yield _values(name, check.values, column)
    if check.nulls is not None:
        share = column.null_count / max(len(column), 1)
        yield Finding("nulls", name, f"{share:.4g}", f"at most {check.nulls:g}", share <= check.nulls)


def _range(name: str, check: ColumnCheck, column: pa.ChunkedArray) -> Finding:
    bound = " and ".join([f"at least {check.low}"] * (check.low is not None) + [f"at most {check.high}"] * (check.high is not None))
    try:
        low, high = (None if limit is None else _scalar(limit, column.type) for limit in (check.low, check.high))
        outside = pa.array(np.zeros(len(column), bool)) if low is None else pc.less(column, low)
        outside = outside if high is None else pc.or_(outside, pc.greater(column, high))
        if pt.is_floating(column.type):
            outside = pc.or_(outside, pc.is_nan(column))
    except (pa.ArrowException, ValueError, TypeError) as error:
        return Finding("ranges", name, f"values of type {column.type} cannot be compared: {error}", bound, False)
    count = pc.sum(outside).as_py() or 0
    extremes = pc.min_max(column).as_py()
    value = f"{extremes['min']} to {extremes['max']}" + (f", {count} of {len(column)} outside" if count else "")
    return Finding("ranges", name, value, bound, count == 0)


def _scalar(limit: Any, of: pa.DataType) -> pa.Scalar:
    if pt.is_timestamp(of):
        time = datetime.fromisoformat(str(limit))
        return pa.scalar(time if time.tzinfo else time.replace(tzinfo=UTC), of)
    if isinstance(limit, str) != pt.is_string(of):
        raise TypeError(f"{limit!r} is not a value of {of}")
    return pa.scalar(limit)


def _values(name: str, allowed: Sequence[Any], column: pa.ChunkedArray) -> Finding:
    known = set(allowed)
    counts = pc.value_counts(column).to_pylist()
    other = {each["values"]: each["counts"] for each in counts if each["values"] is not None and each["values"] not in known}
    shown = ", ".join(f"{value!r} ({count})" for value, count in list(other.items())[:_SHOWN])
    value = f"{shown}{' …' if len(other) > _SHOWN else ''}" if other else "no others"
    return Finding("values", name, value, f"of {', '.join(map(str, allowed))}", not other)


def _volume(checks: DataChecks, events: int, before: Sequence[int]) -> Iterator[Finding]:
    volume = checks.volume
    if volume.low is not None:
        yield Finding("volume", None, f"{events:,} events", f"at least {volume.low:,}", events >= volume.low)
    if volume.high is not None:
        yield Finding("volume", None, f"{events:,} events", f"at most {volume.high:,}", events <= volume.high)
    if volume.factor is not None and before:
        median = float(np.median(before))
        low, high = median / volume.factor, median * volume.factor
        bound = f"{low:,.0f} to {high:,.0f} (median of {len(before)} days before is {median:,.0f})"
        yield Finding("volume", None, f"{events:,} events", bound, low <= events <= high)


def _dropped(checks: DataChecks, share: float) -> Iterator[Finding]:
    if checks.dropped is not None:
        yield Finding("dropped", None, f"{share:.4g} of the raw rows", f"at most {checks.dropped:g}", share <= checks.dropped)


def _drift(name: str, check: ColumnCheck, events: pa.Table, before: Sequence[pa.Table]) -> Iterator[Finding]:
    """The PSI of a column against the days before that have it; a column that changed its type has drifted."""
    known = [table.select([name]) for table in before if table.num_rows and name in table.column_names]
    if check.drift is None or not known or not events.num_rows or name not in events.column_names:
        return
    bound = f"at most {check.drift:g} against {len(known)} days before"
    now, types = events.schema.field(name).type, {table.schema.field(name).type for table in known}
    if types != {now}:
        yield Finding("drift", name, f"type {now}, in the days before {', '.join(map(str, types))}", bound, False)
        return
    (found,) = drift(summarize(_with_status(pa.concat_tables(known))), _with_status(events.select([name])))
    yield Finding("drift", name, f"PSI {found.psi:.4f}", bound, found.psi <= check.drift)


def _with_status(table: pa.Table) -> pa.Table:
    """The columns as a reader of features gives them."""
    columns: dict[str, Any] = {}
    for name in table.column_names:
        values = table.column(name).combine_chunks()
        columns[name] = values.cast(pa.int64()).cast(pa.float64()) if pt.is_timestamp(values.type) else values
        status = np.where(np.asarray(values.is_valid()), int(ValueStatus.PRESENT), int(ValueStatus.NULL))
        columns[status_column(name)] = pa.array(status.astype(np.uint8))
    return pa.table(columns)


def _day(partition: str, events: pa.Table) -> Finding:
    """Every event lies in the day."""
    start = datetime.fromisoformat(partition).replace(tzinfo=UTC)
    times, end = events.column(EVENT_TIME), start + timedelta(days=1)
    outside = pc.or_(pc.less(times, pa.scalar(start, times.type)), pc.greater_equal(times, pa.scalar(end, times.type)))
    count = pc.sum(outside).as_py() or 0
    example = f", such as {times.filter(outside)[0].as_py().isoformat(sep=' ')}" if count else ""
    return Finding("day", EVENT_TIME, f"{count} of {events.num_rows} events outside{example}", f"all in {partition}, UTC", count == 0)
