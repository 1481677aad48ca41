# SPDX-License-Identifier: Apache-2.0
"""From source tables to a `Dataset`: the one door through which every data set comes, a public one or a user's own."""

from datetime import UTC, datetime

import polars as pl
import pyarrow as pa

from recsys.core.errors import DataError
from recsys.core.schema import EVENT_TIME, FeatureSchema
from recsys.data.dataset import Dataset, IngestReport
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.ingest import rules
from recsys.data.ingest.ledger import ROW, Ledger
from recsys.data.ingest.source import RawTable

# An Arrow array of type string holds at most 2 GB.
_CHUNK_ROWS = 1 << 20


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
    check_users(name, schema, None if users is None else users.file)
    item_ledger = Ledger("items", items.file, items.frame.height)
    item_frame = rules.read_entities(items, schema.items, item_ledger)
    ledger = Ledger("interactions", interactions.file, interactions.frame.height)
    events = rules.clean_events(rules.read_events(interactions, schema.interactions, ledger), ledger, instant(now))
    events, item_frame = rules.settle_unknown_items(events, item_frame, schema.on_unknown_item, ledger, item_ledger)
    events = rules.drop_repeated(events, ledger).sort(EVENT_TIME, ROW)
    if events.height == 0:
        raise DataError(f"{interactions.file}: no event is left of {ledger.read} ({ledger.summary()})")

    done = [(ledger, events), (item_ledger, item_frame)]
    user_table = None
    if users is not None and schema.users is not None:
        user_ledger = Ledger("users", users.file, users.frame.height)
        user_frame = rules.read_entities(users, schema.users, user_ledger)
        user_table = to_arrow(user_frame, schema.users.features)
        done.append((user_ledger, user_frame))
    report = IngestReport(
        tables=tuple(book.counts(frame.height) for book, frame in done),
        treatments=tuple(treatment for book, _ in done for treatment in book.treatments),
        first_event=events[EVENT_TIME][0],
        last_event=events[EVENT_TIME][-1],
    )
    event_table, item_table = to_arrow(events, schema.interactions.features), to_arrow(item_frame, schema.items.features)
    return Dataset(name, event_table, item_table, user_table, schema, report)


def check_users(name: str, schema: DatasetSchema, file: str | None) -> None:
    """Raise a `DataError` where there is a source of users and the schema has none, or the other way round."""
    if (file is None) != (schema.users is None):
        has, lacks = ("the schema", "no source is given") if file is None else (file, "the schema does not")
        raise DataError(f"{name}: users: {has} has them, but {lacks}: expected both or neither")


def instant(now: datetime | None) -> datetime:
    """``now`` in UTC, by default the present; `DataError` where it has no offset."""
    if now is None:
        return datetime.now(UTC)
    if now.tzinfo is None:
        raise DataError(f"now: expected a time with an offset from UTC, got {now.isoformat()}")
    return now.astimezone(UTC)


def to_arrow(frame: pl.DataFrame, features: FeatureSchema) -> pa.Table:
    """The canonical columns of a frame as Arrow."""
    table = frame.select(features.names()).to_arrow(compat_level=pl.CompatLevel.oldest())
    return features.conform(pa.Table.from_batches(table.to_batches(max_chunksize=_CHUNK_ROWS), schema=table.schema))
