# SPDX-License-Identifier: Apache-2.0
"""A data set whose events come in days: each day is made canonical alone, and all are joined with the items and users.

A day that is completed late changes its own rows and no other day's: a row's ``ingest_seq`` is its place in its day, above a multiple of
2^32 that is the day's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.core.config import Config, parse
from recsys.core.errors import DataError
from recsys.core.files import read_json, write_json
from recsys.core.schema import EVENT_TIME
from recsys.data.dataset import Dataset, TableCounts, Treatment
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.frames import from_arrow, to_arrow
from recsys.data.ingest.canonical import clean
from recsys.data.ingest.entities import Entities
from recsys.data.ingest.ledger import ROW, Ledger, sum_treatments
from recsys.data.ingest.source import RawTable

_PER_DAY = 1 << 32


class DayReport(Config):
    """What was read of a day, what was kept, and why the rest was not; unknown items are settled when the days are joined."""

    day: str
    counts: TableCounts
    treatments: tuple[Treatment, ...]


@dataclass(frozen=True)
class DayEvents:
    """The canonical events of one day.

    Attributes:
        events: the columns of a data set's interactions, by ``event_time``, then ``ingest_seq``.
        report: how the raw files became these rows.
    """

    events: pa.Table
    report: DayReport

    def save(self, table: Path, report: Path) -> None:
        """Write Parquet and JSON."""
        pq.write_table(self.events, table, compression="zstd")
        write_json(report, self.report.model_dump(mode="json"))

    @classmethod
    def load(cls, table: Path, report: Path) -> "DayEvents":
        """What `save` wrote."""
        return cls(pq.read_table(table), parse(DayReport, read_json(report), source=str(report)))


def canonical_day(schema: DatasetSchema, day: str, raw: RawTable, *, now: datetime | None = None) -> DayEvents:
    """Cast, check and clean the events of one day, see `recsys.data.ingest.canonicalise`; unknown items stay.

    Args:
        schema: the roles of the source columns.
        day: ``YYYY-MM-DD``.
        raw: the day's rows, in the order of their arrival.
        now: the latest time at which an event can have happened; by default the present.

    Raises:
        SchemaError: a column is absent, or holds a value that cannot be cast without loss.
    """
    events, ledger = clean(schema, raw, now)
    first = date.fromisoformat(day).toordinal() * _PER_DAY
    table = to_arrow(events.with_columns(pl.col(ROW) + first), schema.interactions.features)
    return DayEvents(table, DayReport(day=day, counts=ledger.counts(events.height), treatments=tuple(ledger.treatments)))


def join_days(name: str, schema: DatasetSchema, days: Mapping[str, DayEvents], items: RawTable, users: RawTable | None) -> Dataset:
    """One data set of the events of all days.

    Args:
        name: what to call it.
        schema: the roles of the source columns.
        days: the events of each.
        items: the source of items.
        users: the source of users' attributes: needed if, and only if, the schema has ``users``.

    Raises:
        SchemaError: see `canonical_day`.
        DataError: two rows of one id differ, an item is unknown where that is an error, or no event is left.
    """
    entities = Entities(name, schema, items, users)
    events = pl.concat([from_arrow(day.events) for day in days.values()]) if days else pl.DataFrame()
    if events.height == 0:
        raise DataError(f"{name}: no event is left of {len(days)} days")
    ledger = Ledger("interactions", name, sum(day.report.counts.read for day in days.values()))
    events = entities.settle(events, ledger).sort(EVENT_TIME, ROW)
    if events.height == 0:
        raise DataError(f"{name}: no event is of a known item")
    of_days = sum_treatments((treatment for day in days.values() for treatment in day.report.treatments), one_source=False)
    table, span = to_arrow(events, schema.interactions.features), (events[EVENT_TIME][0], events[EVENT_TIME][-1])
    return entities.dataset(table, ledger.counts(events.height), (*of_days, *ledger.treatments), span)
