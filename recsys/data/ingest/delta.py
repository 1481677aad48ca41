# SPDX-License-Identifier: Apache-2.0
"""A user's events, cleaned and appended to a log that is a Delta table; and a version of that log as a data set.

Unlike a data set in a directory, the log holds events of all items: items and users stay in files of their own, and which events are of
known items is settled when log and items are read together.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from recsys.core.delta import DeltaVersion, append_events
from recsys.core.errors import DataError
from recsys.core.files import canonical_json, sha256_file, sha256_json
from recsys.core.schema import AVAILABLE_TIME, EVENT_TIME, INGEST_SEQ, ITEM, USER
from recsys.data.dataset import Dataset, TableCounts, Treatment
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.frames import from_arrow, to_arrow
from recsys.data.ingest.canonical import clean
from recsys.data.ingest.entities import Entities
from recsys.data.ingest.ledger import ROW, Ledger
from recsys.data.ingest.source import RawTable, read_table

NOTE = "recsys.ingest"
"""The key, among the texts of a commit, of what was done to the source's rows."""
_NOT_NULL = (USER, ITEM, EVENT_TIME, AVAILABLE_TIME, INGEST_SEQ)


@dataclass(frozen=True)
class AppendReport:
    """What an ingest into a log did.

    Attributes:
        log: a version that holds the events.
        added: how many rows the log has more than before; 0 where the transaction was there already.
        counts: what was read of the source and kept.
        treatments: why the rest was not.
    """

    log: DeltaVersion
    added: int
    counts: TableCounts
    treatments: tuple[Treatment, ...]


def ingest_delta(
    interactions_path: str | Path,
    schema: DatasetSchema,
    table: str | Path,
    *,
    transaction: tuple[str, int] | None = None,
    by_day: bool = False,
    now: datetime | None = None,
) -> AppendReport:
    """Read Parquet, CSV or TSV files of events, clean them (see `recsys.data.ingest.canonical.clean`), and append them to a log.

    Killed anywhere and run again, it leaves each event in the log once. A row that equals one of an earlier append is not looked for.

    Args:
        interactions_path: the source.
        schema: the roles of the source columns.
        table: the folder of the Delta table, which the first append makes.
        transaction: whose append it is and the number, see `recsys.core.delta.append_events`; by default it is named by the content of
            the source and its roles, so that the same files are appended once.
        by_day: make a new table with a folder for each day.
        now: the latest time at which an event can have happened; by default the present.

    Raises:
        ConfigError: the library is not installed.
        SchemaError: a column is absent, cannot be cast without loss, or is another one than the log has.
        DataError: the source cannot be read, or the log cannot be appended to.
    """
    source = Path(interactions_path)
    events, ledger = clean(schema, read_table(source, schema.interactions.sources), now)
    app, number = transaction or (f"recsys ingest {_content(source, schema)}", 1)
    counts, path = ledger.counts(events.height), Path(table).resolve()
    told = {"counts": counts.model_dump(mode="json"), "treatments": [each.model_dump(mode="json") for each in ledger.treatments]}
    rows = to_arrow(events, schema.interactions.features)
    done = append_events(path, rows, app=app, number=number, by_day=by_day, note={NOTE: canonical_json(told).decode()})
    return AppendReport(DeltaVersion(path, done.version), done.added, counts, tuple(ledger.treatments))


def read_log(log: DeltaVersion, schema: DatasetSchema, items: RawTable, users: RawTable | None) -> Dataset:
    """A version of a log with its items and users, as a data set named ``log@v7``.

    Raises:
        ConfigError: the library is not installed.
        SchemaError: the log lacks a column, or has it with another type.
        DataError: an event lacks its user, item or a time; two rows of one id differ; an item is unknown where that is an error; no event
            is left.
    """
    name = f"{log.path.name}@v{log.version}"
    columns = schema.interactions.features
    table = columns.conform(log.read(columns.names()), what=str(log))
    for column in _NOT_NULL:
        if table.column(column).null_count:
            raise DataError(f"{log}: expected a value of {column!r} in every row, but {table.column(column).null_count} are null")
    entities, ledger = Entities(name, schema, items, users), Ledger("interactions", str(log), table.num_rows)
    events = entities.settle(from_arrow(table), ledger).sort(EVENT_TIME, ROW)
    if events.height == 0:
        raise DataError(f"{log}: no event is left of {table.num_rows}")
    span = (events[EVENT_TIME][0], events[EVENT_TIME][-1])
    return entities.dataset(to_arrow(events, columns), ledger.counts(events.height), ledger.treatments, span)


def _content(source: Path, schema: DatasetSchema) -> str:
    """A hash of the content of the source's files and of the roles of its columns."""
    files = [source] if source.is_file() else sorted(file for file in source.rglob("*") if file.is_file())
    return sha256_json([[sha256_file(file) for file in files], schema.interactions.model_dump(mode="json")])
