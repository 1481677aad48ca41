# SPDX-License-Identifier: Apache-2.0
"""A data set whose events come in days: each day is made canonical alone, and all are joined with the items and users.

A day that is completed late changes its own rows and no other day's: a row's ``ingest_seq`` is its place in its day, above a multiple of
2^32 that is the day's own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.core.config import Config, parse
from recsys.core.errors import DataError
from recsys.core.files import read_json, write_json
from recsys.core.schema import EVENT_TIME
from recsys.data.dataset import Dataset, IngestReport, TableCounts, Treatment
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.frames import from_arrow
from recsys.data.ingest import rules
from recsys.data.ingest.canonical import to_arrow
from recsys.data.ingest.ledger import ROW, Ledger
from recsys.data.ingest.source import RawTable

_PER_DAY = 1 << 32
_EXAMPLES = 3


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
    ledger = Ledger("interactions", raw.file, raw.frame.height)
    events = rules.clean_events(rules.read_events(raw, schema.interactions, ledger), ledger, now or datetime.now(UTC))
    events = rules.drop_repeated(events, ledger).sort(EVENT_TIME, ROW)
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
    if (users is None) != (schema.users is None):
        raise DataError(f"{name}: users: expected a source of them if, and only if, the schema has them")
    item_ledger = Ledger("items", items.file, items.frame.height)
    item_frame = rules.read_entities(items, schema.items, item_ledger)
    ledger = Ledger("interactions", name, 0)
    events = pl.concat([from_arrow(day.events) for day in days.values()]) if days else pl.DataFrame()
    if events.height == 0:
        raise DataError(f"{name}: no event is left of {len(days)} days")
    events, item_frame = rules.settle_unknown_items(events, item_frame, schema.on_unknown_item, ledger, item_ledger)
    if events.height == 0:
        raise DataError(f"{name}: no event is of a known item")
    events = events.sort(EVENT_TIME, ROW)
    tables = [TableCounts(table="interactions", file=name, read=sum(d.report.counts.read for d in days.values()), kept=events.height)]
    treatments = [*_summed(treatment for day in days.values() for treatment in day.report.treatments), *ledger.treatments]
    tables.append(item_ledger.counts(item_frame.height))
    treatments += item_ledger.treatments
    user_table = None
    if users is not None and schema.users is not None:
        user_ledger = Ledger("users", users.file, users.frame.height)
        user_frame = rules.read_entities(users, schema.users, user_ledger)
        user_table = to_arrow(user_frame, schema.users.features)
        tables.append(user_ledger.counts(user_frame.height))
        treatments += user_ledger.treatments
    report = IngestReport(
        tables=tuple(tables),
        treatments=tuple(treatments),
        first_event=events[EVENT_TIME][0],
        last_event=events[EVENT_TIME][-1],
    )
    event_table, item_table = to_arrow(events, schema.interactions.features), to_arrow(item_frame, schema.items.features)
    return Dataset(name, event_table, item_table, user_table, schema, report)


def _summed(treatments: Iterable[Treatment]) -> list[Treatment]:
    """One treatment for each rule, over all days."""
    found: dict[tuple[str, str, str | None, str], Treatment] = {}
    for each in treatments:
        rule = (each.table, each.rule, each.column, each.action)
        before = found.get(rule)
        if before is None:
            found[rule] = each
        else:
            examples = (before.examples + each.examples)[:_EXAMPLES]
            found[rule] = before.model_copy(update={"count": before.count + each.count, "examples": examples})
    return list(found.values())
