# SPDX-License-Identifier: Apache-2.0
"""From source tables to a `Dataset`: the one door through which every data set comes, a public one or a user's own."""

from datetime import UTC, datetime

import polars as pl

from recsys.core.errors import DataError
from recsys.core.schema import EVENT_TIME
from recsys.data.dataset import Dataset
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.frames import to_arrow
from recsys.data.ingest import rules
from recsys.data.ingest.entities import Entities
from recsys.data.ingest.ledger import ROW, Ledger, summary
from recsys.data.ingest.source import RawTable


def canonicalise(
    name: str, schema: DatasetSchema, interactions: RawTable, items: RawTable, users: RawTable | None = None, *, now: datetime | None = None
) -> Dataset:
    """Cast, check and clean the source tables. Every row that is not kept is counted in the data set's report.

    An event is dropped, and counted by the first of these rules that it meets, where its user, item or time is null; where it lies
    after ``now``; where the items do not hold its item (`UnknownItem` says what else may be done); where an earlier row equals it in
    all canonical values. A row of items or users is dropped where its id is null or an earlier row equals it. A null
    ``available_time`` becomes the ``event_time``. Users of whom no attributes are known are kept.

    Args:
        name: what to call the data set.
        schema: the roles of the source columns.
        interactions: the source of events, in the order of their arrival.
        items: the source of items.
        users: the source of users' attributes: needed if, and only if, the schema has ``users``.
        now: the latest time at which an event can have happened; by default the present.

    Raises:
        SchemaError: a column is absent, or holds a value that cannot be cast without loss.
        DataError: two rows of one id differ; an item is unknown where that is an error; no event is left.
    """
    entities = Entities(name, schema, items, users)
    ledger = Ledger("interactions", interactions.file, interactions.frame.height)
    events = rules.clean_events(rules.read_events(interactions, schema.interactions, ledger), ledger, instant(now))
    events = entities.settle(events, ledger)
    events = rules.drop_repeated(events, ledger).sort(EVENT_TIME, ROW)
    if events.height == 0:
        raise DataError(f"{interactions.file}: no event is left of {ledger.read} ({summary(ledger.treatments)})")
    table, span = to_arrow(events, schema.interactions.features), (events[EVENT_TIME][0], events[EVENT_TIME][-1])
    return entities.dataset(table, ledger.counts(events.height), ledger.treatments, span)


def instant(now: datetime | None) -> datetime:
    """``now`` in UTC, by default the present; `DataError` where it has no offset."""
    if now is None:
        return datetime.now(UTC)
    if now.tzinfo is None:
        raise DataError(f"now: expected a time with an offset from UTC, got {now.isoformat()}")
    return now.astimezone(UTC)


def clean(schema: DatasetSchema, raw: RawTable, now: datetime | None = None) -> tuple[pl.DataFrame, Ledger]:
    """Canonical events by ``event_time``, then place, and what was done to the source's rows; unknown items stay.

    Args:
        schema: the roles of the source columns.
        raw: the source of events, in the order of their arrival.
        now: the latest time at which an event can have happened; by default the present.

    Raises:
        SchemaError: a column is absent, or holds a value that cannot be cast without loss.
    """
    ledger = Ledger("interactions", raw.file, raw.frame.height)
    events = rules.clean_events(rules.read_events(raw, schema.interactions, ledger), ledger, instant(now))
    return rules.drop_repeated(events, ledger).sort(EVENT_TIME, ROW), ledger
