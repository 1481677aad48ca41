# SPDX-License-Identifier: Apache-2.0
"""Delta tables: read at one version, so that later appends do not show, and appended to as a log of events.

A version is written ``table@v7``, as a path or in a message. Whoever appends takes the next numbers of ``ingest_seq``, so appends stand
one after another: of two writers at the same time one commits first, and the other one reads the table again and numbers its rows anew.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from recsys.core.errors import ConfigError, DataError, SchemaError, unknown
from recsys.core.schema import AVAILABLE_TIME, EVENT_TIME, INGEST_SEQ

LOG_FOLDER, DAY = "_delta_log", "event_day"
ATTEMPTS = 5
"""How often an append is tried while other writers commit."""
_PINNED = re.compile(r"(.+)@v(\d+)")


@dataclass(frozen=True)
class DeltaVersion:
    """A Delta table as it was at one version.

    Attributes:
        path: its folder.
        version: the number of the version.
    """

    path: Path
    version: int

    @classmethod
    def open(cls, path: Path, version: int | None = None) -> "DeltaVersion":
        """The table at ``version``, by default the latest.

        Raises:
            ConfigError: the library is not installed.
            DataError: there is no such table or version.
        """
        return cls(path, _load(path, version).version())

    def __str__(self) -> str:
        return f"{self.path}@v{self.version}"

    @property
    def id(self) -> str:
        """What tells the table from another one at the same place."""
        return str(_load(self.path, self.version).metadata().id)

    @property
    def schema(self) -> pa.Schema:
        """The columns, those of which the table is partitioned included."""
        return self._dataset().schema

    def files(self, above: int | None = None) -> list[str]:
        """The Parquet files of the version, sorted by name; with ``above`` those that may hold what `read` gives for it."""
        folder = self.path.resolve()
        return sorted(str(folder / fragment.path) for fragment in self._dataset().get_fragments(_later_than(above)))

    def read(self, columns: Sequence[str], *, above: int | None = None) -> pa.Table:
        """Columns of all rows, in no particular order.

        Args:
            columns: their names.
            above: only rows whose ``ingest_seq`` is greater (or null, which is left to the reader to refuse). Files and row groups of
                which the statistics say that they hold no such row are not read.

        Raises:
            DataError: a file cannot be read.
            SchemaError: a column is absent.
        """
        dataset = self._dataset()
        for name in (*columns, *(() if above is None else (INGEST_SEQ,))):
            if name not in dataset.schema.names:
                raise SchemaError(f"{self}: missing column: {unknown('column', name, dataset.schema.names)}")
        try:
            return dataset.to_table(columns=list(columns), filter=_later_than(above))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self}: cannot be read: {error}") from None

    def last_ingest_seq(self) -> int | None:
        """The highest ``ingest_seq``, by the statistics of the files where all have it; None where there are no rows."""
        actions, name = pa.table(_load(self.path, self.version).get_add_actions(flatten=True)), f"max.{INGEST_SEQ}"
        told = name in actions.column_names and not actions.column(name).null_count
        last: int | None = pc.max((actions if told else self.read([INGEST_SEQ])).column(name if told else INGEST_SEQ)).as_py()
        return last

    def _dataset(self) -> Any:
        errors = import_deltalake().exceptions
        try:
            return _load(self.path, self.version).to_pyarrow_dataset()
        except errors.DeltaProtocolError as error:
            raise DataError(f"{self}: cannot be read: {error}") from None


@dataclass(frozen=True)
class Appended:
    """What an append did.

    Attributes:
        version: one that holds the events.
        added: how many rows were added; 0 where the transaction was there already.
    """

    version: int
    added: int


def is_delta(path: Path) -> bool:
    """Whether a folder is a Delta table."""
    return (path / LOG_FOLDER).is_dir()


def pinned(path: Path) -> DeltaVersion | None:
    """The version that a path such as ``table@v7`` names; None for every other path.

    Raises:
        ConfigError: the library is not installed.
        DataError: it names a table without a version, or one that is not there.
    """
    if is_delta(path):
        raise DataError(f"{path} is a Delta table: say which version, such as {DeltaVersion.open(path)}")
    named = _PINNED.fullmatch(path.name)
    if named is None or path.exists():
        return None
    return DeltaVersion.open(path.with_name(named[1]), int(named[2]))


def append_events(
    path: Path, events: pa.Table, *, app: str, number: int, by_day: bool = False, note: Mapping[str, str] | None = None
) -> Appended:
    """Add events to the log at ``path`` in one commit; the first append makes the table.

    The rows' ``ingest_seq`` is raised above all that are in the table; their order among each other stays.

    Args:
        path: the folder of the table.
        events: with the three times of an event, none of them null, and the same columns in every append.
        app: whose transaction it is.
        number: of the transaction, which must rise with each one of ``app``: what was appended with an equal or higher number is there
            already, and nothing is added.
        by_day: make a new table with a folder for each day of the event time, in UTC.
        note: texts to be kept with the commit.

    Raises:
        ConfigError: the library is not installed.
        DataError: ``path`` holds something else, a time is null, or other writers committed first again and again; nothing is added then.
        SchemaError: the columns are not those of the table.
    """
    deltalake = import_deltalake()
    for name in (EVENT_TIME, AVAILABLE_TIME, INGEST_SEQ):
        if name not in events.column_names:
            raise SchemaError(f"{path}: events: missing column: {unknown('column', name, events.column_names)}")
        if events.column(name).null_count:
            raise DataError(f"{path}: events: expected a value of {name!r} in every row, but {events.column(name).null_count} are null")
    _create(path, events.schema, by_day)
    for _ in range(ATTEMPTS):
        table = _load(path, None)
        found = table.transaction_version(app)
        if found is not None and found >= number:
            return Appended(table.version(), 0)
        try:
            _commit(table, _numbered(DeltaVersion(path, table.version()), events), app, number, note or {})
        except deltalake.exceptions.CommitFailedError:
            continue
        except deltalake.exceptions.DeltaError as error:
            raise DataError(f"{path}: the events cannot be appended: {error}") from None
        return Appended(DeltaVersion.open(path).version, events.num_rows)
    raise DataError(f"{path}: other writers committed first, {ATTEMPTS} times; nothing was added: append again")


def import_deltalake() -> ModuleType:
    """The library; `ConfigError` where it is not installed."""
    try:
        import deltalake
        import deltalake.exceptions
    except ImportError as error:
        raise ConfigError(f"Delta tables: {error}; install it with pip install 'recsys-scaling[delta]'") from None
    module: ModuleType = deltalake
    return module


def _load(path: Path, version: int | None) -> Any:
    deltalake = import_deltalake()
    if not is_delta(path):
        raise DataError(f"{path} is not a Delta table: it has no {LOG_FOLDER}")
    try:
        return deltalake.DeltaTable(str(path), version=version)
    except (deltalake.exceptions.DeltaError, OSError, ValueError) as error:
        raise DataError(f"{path}: {'the table' if version is None else f'version {version}'} cannot be read: {error}") from None


def _create(path: Path, schema: pa.Schema, by_day: bool) -> None:
    """Make an empty table, unless it is there."""
    deltalake = import_deltalake()
    # Listed before it is asked for a table, so that what another writer puts there meanwhile is not taken for something else.
    occupied = path.is_file() or (path.is_dir() and any(entry.name != LOG_FOLDER for entry in path.iterdir()))
    if not deltalake.DeltaTable.is_deltatable(str(path)):
        if occupied:
            raise DataError(f"{path} exists already and is not a Delta table: choose another name")
        columns, by = (schema.append(pa.field(DAY, pa.date32())), [DAY]) if by_day else (schema, None)
        try:
            settings = {"delta.appendOnly": "true"}
            deltalake.DeltaTable.create(str(path), columns, mode="ignore", partition_by=by, configuration=settings)
        except deltalake.exceptions.DeltaError as error:
            if not deltalake.DeltaTable.is_deltatable(str(path)):  # else another writer has made it meanwhile
                raise DataError(f"{path}: the table cannot be made: {error}") from None
    found = DeltaVersion.open(path).schema
    wanted = [(field.name, field.type) for field in schema]
    there = [(field.name, field.type) for field in found if field.name != DAY]
    if wanted != there:
        spelled = (", ".join(f"{name} {kind}" for name, kind in columns) for columns in (there, wanted))
        raise SchemaError("{}: expected the columns {}; got {}".format(path, *spelled))


def _numbered(table: DeltaVersion, events: pa.Table) -> pa.Table:
    """The events above what is in the table, with their day where the table has one."""
    last = table.last_ingest_seq()
    if last is not None and events.num_rows:
        first = last + 1 - min(0, pc.min(events.column(INGEST_SEQ)).as_py())
        raised = pc.add(events.column(INGEST_SEQ), pa.scalar(first, pa.int64()))
        events = events.set_column(events.schema.get_field_index(INGEST_SEQ), events.schema.field(INGEST_SEQ), raised)
    if DAY in table.schema.names:
        days = pc.floor_temporal(events.column(EVENT_TIME), unit="day").cast(pa.timestamp("us")).cast(pa.date32())
        events = events.append_column(pa.field(DAY, pa.date32()), days)
    return events


def _commit(table: Any, events: pa.Table, app: str, number: int, note: Mapping[str, str]) -> None:
    """Write the events as the version after that of ``table``, or fail because there is one already."""
    deltalake = import_deltalake()
    properties = deltalake.CommitProperties(
        custom_metadata=dict(note), max_commit_retries=0, app_transactions=[deltalake.Transaction(app, number)]
    )
    deltalake.write_deltalake(table, events, mode="append", commit_properties=properties)


def _later_than(above: int | None) -> ds.Expression | None:
    if above is None:
        return None
    place = ds.field(INGEST_SEQ)
    return (place > above) | place.is_null()
