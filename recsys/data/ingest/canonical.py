# SPDX-License-Identifier: Apache-2.0
"""From source tables to a `Dataset`: the one door through which every data set comes, a public one or a user's own."""

from datetime import UTC, datetime

import polars as pl
import pyarrow as pa

from recsys.core.errors import DataError
from recsys.core.schema import AVAILABLE_TIME, EVENT_TIME, INGEST_SEQ, ITEM, USER, FeatureSchema
from recsys.data.dataset import Dataset, IngestReport, TableName
from recsys.data.dataset_schema import DatasetSchema, InteractionsSchema, ItemsSchema, SourceColumn, UnknownItem, UsersSchema
from recsys.data.ingest.cast import to_text, to_times, to_values
from recsys.data.ingest.ledger import ROW, Ledger
from recsys.data.ingest.source import RawTable

_SHOWN = [USER, ITEM, EVENT_TIME]
# Text columns of Arrow hold 2 GB in one chunk.
_CHUNK_ROWS = 1 << 20


def canonicalise(
    name: str, schema: DatasetSchema, interactions: RawTable, items: RawTable, users: RawTable | None = None, *, now: datetime | None = None
) -> Dataset:
    """Cast, check and clean the source tables. Every row that is not kept is counted in the data set's report.

    An event is dropped, by the first of these rules that it meets, where user, item or time is null; where it lies after ``now``; where
    the items do not hold its item (see `UnknownItem`); where an earlier row equals it in all canonical values. A null
    ``available_time`` becomes the ``event_time``. A row of items or users is dropped where its id is null, or where an earlier row
    equals it. Users without attributes are kept.

    Args:
        name: what to call the data set.
        schema: the roles of the source columns.
        interactions: the source of events, in the order of their arrival.
        items: the source of items.
        users: the source of users' attributes; needed if, and only if, the schema has ``users``.
        now: the latest time at which an event can have happened; by default the present.

    Raises:
        SchemaError: a column is absent, or holds a value that cannot be cast without loss.
        DataError: two rows of one id differ; an unknown item where that is an error; no event is left.
    """
    if (users is None) != (schema.users is None):
        raise DataError(f"{name}: the schema has {'no ' if schema.users is None else ''}users, but a users table was {'not ' if users is None else ''}given")
    now = datetime.now(UTC) if now is None else now
    if now.tzinfo is None:
        raise DataError(f"now: expected a time with an offset, got {now.isoformat()}")
    item_ledger = Ledger("items", items.file, items.frame.height)
    item_frame = _entities(items, schema.items, schema.items.item_id, ITEM, item_ledger)
    ledger = Ledger("interactions", interactions.file, interactions.frame.height)
    events = _events(interactions, schema.interactions, ledger)
    events = _drop_invalid(events, ledger, now)
    events, item_frame = _known_items(events, item_frame, schema.on_unknown_item, ledger, item_ledger)
    duplicate = ~events.select(pl.struct(pl.exclude(ROW)).is_first_distinct()).to_series()
    events = ledger.drop(events, duplicate, "exact_duplicate", _SHOWN)
    if events.height == 0:
        raise DataError(f"{interactions.file}: no event is left of {ledger.read}: " + ", ".join(f"{t.rule} {t.count}" for t in ledger.treatments if t.count))
    events = events.rename({ROW: INGEST_SEQ}).sort(EVENT_TIME, INGEST_SEQ)

    ledgers, kept = [ledger, item_ledger], [events.height, item_frame.height]
    user_table = None
    if users is not None and schema.users is not None:
        user_ledger = Ledger("users", users.file, users.frame.height)
        user_frame = _entities(users, schema.users, schema.users.user_id, USER, user_ledger)
        user_table = _to_arrow(user_frame, schema.users.features)
        ledgers.append(user_ledger)
        kept.append(user_frame.height)
    return Dataset(
        name=name,
        interactions=_to_arrow(events, schema.interactions.features),
        items=_to_arrow(item_frame, schema.items.features),
        users=user_table,
        schema=schema,
        report=IngestReport(
            tables=tuple(book.close(rows) for book, rows in zip(ledgers, kept, strict=True)),
            treatments=tuple(treatment for book in ledgers for treatment in book.treatments),
            first_event=events[EVENT_TIME][0],
            last_event=events[EVENT_TIME][-1],
        ),
    )
