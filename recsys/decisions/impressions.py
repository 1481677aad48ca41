# SPDX-License-Identifier: Apache-2.0
"""What the feedback loop reads and writes: feedback events in, labelled impressions out, and the schema by which these are ingested."""

from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as ds

from recsys.core.errors import DataError
from recsys.core.schema import AVAILABLE_TIME, EVENT_TIME, ITEM, USER, Column, Dtype, FeatureSchema, Kind
from recsys.data.dataset_schema import DatasetSchema, InteractionsSchema, ItemsSchema, SourceColumn, TimeColumn, TimeUnit
from recsys.data.ingest.cast import to_text, to_times, to_values
from recsys.data.ingest.source import read_table

REQUEST, KIND, LABEL = "request_id", "kind", "label"
DEFAULT_KIND, DEFAULT_LABEL = "click", 1.0

EVENT_KEYS = (REQUEST, ITEM, EVENT_TIME, KIND, LABEL)
"""What makes a feedback event: two that agree in all are one that came twice."""

EVENTS = FeatureSchema(
    columns=(
        Column(name=REQUEST, kind=Kind.ID),
        Column(name=ITEM, kind=Kind.ID),
        Column(name=EVENT_TIME, kind=Kind.TIME),
        Column(name=KIND, kind=Kind.CATEGORICAL),
        Column(name=LABEL, kind=Kind.LABEL),
    )
)
JOINED = FeatureSchema(columns=(*EVENTS.columns, Column(name="request_time", kind=Kind.TIME)))
APART = FeatureSchema(columns=(*EVENTS.columns, Column(name="reason", kind=Kind.CATEGORICAL)))

SCHEMA = DatasetSchema(
    interactions=InteractionsSchema(
        event_time=TimeColumn(column="event_time"),
        available_time=TimeColumn(column="available_time"),
        values=(
            SourceColumn(name=LABEL, kind=Kind.LABEL),
            SourceColumn(name="shown_position", source="position", kind=Kind.DENSE, dtype=Dtype.INT),
            SourceColumn(name="propensity", kind=Kind.DENSE),
            SourceColumn(name=REQUEST, kind=Kind.ID),
            SourceColumn(name="list_kind", kind=Kind.CATEGORICAL),
        ),
    ),
    items=ItemsSchema(),
)
"""Impressions as interactions. An impression happened at its request and came to be known when its window closed. (A split of a data set
adds a column `position` of its own.)"""

_FIXED = tuple(column for column in SCHEMA.interactions.features.columns if column.name in (USER, ITEM, EVENT_TIME, AVAILABLE_TIME))
_VALUES = tuple(Column(name=value.source_name, kind=value.kind, dtype=value.dtype) for value in SCHEMA.interactions.values)
IMPRESSIONS = FeatureSchema(columns=(*_FIXED, *_VALUES))


def read_feedback(path: Path) -> tuple[pl.DataFrame, int]:
    """The feedback events of a Parquet, CSV or TSV file (or a folder of Parquet files); and how many incomplete rows are left out.

    The columns are ``request_id``, ``item_id``, ``event_time`` (a timestamp, or ISO 8601 text), and ``kind`` or ``label`` or both: without
    a kind an event is a click, and without a label it counts 1. A row is incomplete that lacks any of them.

    Raises:
        DataError: the file cannot be read, or has neither kind nor label; names it.
        SchemaError: a column is absent, or holds a value that cannot be cast without loss.
    """
    given = _columns(path)
    if KIND not in given and LABEL not in given:
        raise DataError(f"{path}: expected a column {KIND!r} or {LABEL!r}, got {', '.join(given)}")
    names = [name for name in EVENT_KEYS if name in given or name in (REQUEST, ITEM, EVENT_TIME)]
    raw = read_table(path, {f"feedback.{name}": name for name in names})
    columns = {name: raw.column(f"feedback.{name}", name) for name in names}
    frame = pl.DataFrame(
        {
            REQUEST: to_text(columns[REQUEST]),
            ITEM: to_text(columns[ITEM]),
            EVENT_TIME: to_times(columns[EVENT_TIME], TimeUnit.ISO),
            **({KIND: to_text(columns[KIND])} if KIND in columns else {}),
            **({LABEL: to_values(columns[LABEL], SourceColumn(name=LABEL, kind=Kind.LABEL)).values} if LABEL in columns else {}),
        }
    )
    if KIND not in columns:
        frame = frame.with_columns(pl.lit(DEFAULT_KIND).alias(KIND))
    if LABEL not in columns:
        frame = frame.with_columns(pl.lit(DEFAULT_LABEL).alias(LABEL))
    whole = frame.select(EVENT_KEYS).drop_nulls()
    return whole, frame.height - whole.height


def _columns(path: Path) -> list[str]:
    """The names of a file's columns."""
    separator = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
    try:
        if separator is not None:
            with pa.csv.open_csv(path, parse_options=pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True)) as reader:
                return list(reader.schema.names)
        return list(ds.dataset(path, format="parquet").schema.names)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
