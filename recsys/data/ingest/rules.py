# SPDX-License-Identifier: Apache-2.0
"""What is done to rows that break a rule. Each function takes and gives a frame, and records in a `Ledger` what it did."""

from datetime import datetime

import polars as pl

from recsys.core.errors import DataError
from recsys.core.schema import AVAILABLE_TIME, EVENT_TIME, ITEM, USER
from recsys.data.dataset_schema import InteractionsSchema, ItemsSchema, SourceColumn, UnknownItem, UsersSchema
from recsys.data.ingest.cast import to_text, to_times, to_values
from recsys.data.ingest.ledger import NON_FINITE, ROW, Ledger
from recsys.data.ingest.source import RawTable


def read_events(source: RawTable, schema: InteractionsSchema, ledger: Ledger) -> pl.DataFrame:
    """The canonical columns of the events, in the order of the source, with nulls where the source has none."""
    role = "interactions"
    times = {EVENT_TIME: schema.event_time}
    if schema.available_time is not None:
        times[AVAILABLE_TIME] = schema.available_time
    columns = {
        ROW: source.rows,
        USER: to_text(source.column(f"{role}.{USER}", schema.user_id)),
        ITEM: to_text(source.column(f"{role}.{ITEM}", schema.item_id)),
        **{name: to_times(source.column(f"{role}.{name}", time.column), time.unit) for name, time in times.items()},
    }
    return pl.DataFrame(columns | _values(source, role, schema.values, ledger))


def clean_events(events: pl.DataFrame, ledger: Ledger, now: datetime) -> pl.DataFrame:
    """Drop the events that do not say who, what and when, or that lie in the future; fill in when they came to be known."""
    events = ledger.drop(events, events[USER].is_null(), "null_user")
    events = ledger.drop(events, events[ITEM].is_null(), "null_item")
    events = ledger.drop(events, events[EVENT_TIME].is_null(), "null_time")
    events = ledger.drop(events, events.select(pl.col(EVENT_TIME) > now).to_series(), "future_time")
    if AVAILABLE_TIME in events.columns:
        ledger.note("null_available_time", "filled", events.filter(pl.col(AVAILABLE_TIME).is_null()), AVAILABLE_TIME)
        return events.with_columns(pl.col(AVAILABLE_TIME).fill_null(pl.col(EVENT_TIME)))
    return events.with_columns(pl.col(EVENT_TIME).alias(AVAILABLE_TIME))


def settle_unknown_items(
    events: pl.DataFrame, items: pl.DataFrame, rule: UnknownItem, ledger: Ledger, item_ledger: Ledger
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events and items such that the items hold every event's item.

    Raises:
        DataError: there is an unknown item, and the rule says that this is an error.
    """
    unknown = ~events[ITEM].is_in(items[ITEM].implode())
    if rule is UnknownItem.ADD:
        added = events.filter(unknown).select(ITEM).unique().sort(ITEM)
        item_ledger.note("unknown_item", "added", added)
        return events, pl.concat([items, added], how="diagonal")
    if rule is UnknownItem.ERROR and unknown.any():
        row, item = events.filter(unknown).select(ROW, ITEM).row(0)
        raise DataError(
            f"{ledger.file}: row {row} (counted from 0): item_id {item!r} is not among the items of {item_ledger.file} "
            f"({unknown.sum()} such events; on_unknown_item: error)"
        )
    return ledger.drop(events, unknown, "unknown_item"), items


def drop_repeated(frame: pl.DataFrame, ledger: Ledger) -> pl.DataFrame:
    """Drop the rows that equal an earlier one in all values."""
    first = frame.select(pl.struct(pl.exclude(ROW)).is_first_distinct()).to_series()
    return ledger.drop(frame, ~first, "exact_duplicate")


def read_entities(source: RawTable, schema: ItemsSchema | UsersSchema, ledger: Ledger) -> pl.DataFrame:
    """The canonical columns of items or users, one row for each id, in the order of the source.

    Raises:
        DataError: two rows of one id hold different attributes.
    """
    key, column = (ITEM, schema.item_id) if isinstance(schema, ItemsSchema) else (USER, schema.user_id)
    columns = {
        ROW: source.rows,
        key: to_text(source.column(f"{ledger.table}.{key}", column)),
    }
    frame = pl.DataFrame(columns | _values(source, ledger.table, schema.attributes, ledger))
    frame = ledger.drop(frame, frame[key].is_null(), f"null_{ledger.table[:-1]}")
    frame = drop_repeated(frame, ledger)
    twice = frame.filter(pl.col(key).is_duplicated())
    if twice.height:
        identifier = twice[key][0]
        rows = twice.filter(pl.col(key) == identifier)[ROW].to_list()
        others = twice[key].n_unique() - 1
        more = f" ({others} more ids conflict likewise)" if others else ""
        raise DataError(
            f"{source.file}: {ledger.table}: {key} {identifier!r} has different attributes in rows {rows} (counted from 0){more}"
        )
    return frame


def _values(source: RawTable, table: str, columns: tuple[SourceColumn, ...], ledger: Ledger) -> dict[str, pl.Series]:
    result = {}
    for column in columns:
        values = to_values(source.column(f"{table}.{column.name}", column.source_name), column)
        lost = pl.DataFrame({ROW: source.rows.filter(values.non_finite)})
        if lost.height:
            ledger.note(NON_FINITE, "nulled", lost, column.name)
        result[column.name] = values.values
    return result
