# SPDX-License-Identifier: Apache-2.0
"""The table of the promotion log in the database of MLflow's store: SQLite or PostgreSQL.

The database itself holds that the table only grows. A transaction that writes has the table for itself: ``BEGIN IMMEDIATE`` in SQLite, a
lock that lets others read in PostgreSQL.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from sqlalchemy import (
    DDL,
    URL,
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Engine,
    Index,
    Integer,
    MetaData,
    NullPool,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    insert,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, OperationalError

from recsys.core.errors import RegistryError
from recsys.registry.events import Action
from recsys.registry.location import masked

OLD_LOG = "promotions.db"
"""The file beside MLflow's SQLite database in which the log was kept before it moved there."""

_WAIT_SECONDS = 30
_CREATING = 0x5EC5  # an advisory lock of PostgreSQL: two processes create one table
_WRITING = "recsys_writing"
_REFUSAL = "the promotion log is append-only"

EVENTS = Table(
    "promotion_events",
    MetaData(),
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("time", String(32), nullable=False),
    Column("model", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("from_version", Integer),
    Column("to_version", Integer, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("gates", Text, nullable=False),
    Column("details", Text, nullable=False),
    CheckConstraint(f"action IN ({', '.join(repr(action) for action in get_args(Action))})", name="promotion_events_action"),
    Index("promotion_events_by_model", "model", "id"),
    sqlite_autoincrement=True,
)

# SQLite fires no DELETE trigger for the row that INSERT OR REPLACE removes, hence the third.
_GUARDS = {
    "sqlite": (
        f"CREATE TRIGGER promotion_events_no_update BEFORE UPDATE ON promotion_events BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END",
        f"CREATE TRIGGER promotion_events_no_delete BEFORE DELETE ON promotion_events BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END",
        "CREATE TRIGGER promotion_events_no_replace BEFORE INSERT ON promotion_events"
        " WHEN EXISTS (SELECT 1 FROM promotion_events WHERE id = NEW.id)"
        f" BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END",
    ),
    "postgresql": (
        "CREATE OR REPLACE FUNCTION promotion_events_only_grow() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$",
        "CREATE TRIGGER promotion_events_no_change BEFORE UPDATE OR DELETE ON promotion_events"
        " FOR EACH ROW EXECUTE FUNCTION promotion_events_only_grow()",
        "CREATE TRIGGER promotion_events_no_truncate BEFORE TRUNCATE ON promotion_events"
        " FOR EACH STATEMENT EXECUTE FUNCTION promotion_events_only_grow()",
    ),
}
for _dialect, _statements in _GUARDS.items():
    for _statement in _statements:
        event.listen(EVENTS, "after_create", DDL(_statement).execute_if(dialect=_dialect))


def connect(address: str) -> Engine:
    """An engine for the database at a URL, with the table in it.

    Raises:
        RegistryError: the URL is of another kind of database, its driver is absent, or there is no answer.
    """
    try:
        url = make_url(address)
    except ArgumentError:
        raise RegistryError(f"{masked(address)!r}: expected sqlite:///<file> or postgresql://<user>@<host>/<database>") from None
    kind = url.get_backend_name()
    if kind not in _GUARDS:
        raise RegistryError(f"{masked(address)!r}: the promotion log is kept in sqlite or postgresql, got {kind}")
    engine = _sqlite(url) if kind == "sqlite" else _postgresql(url)
    _create(engine)
    return engine


@contextmanager
def transaction(engine: Engine, *, writing: bool = False) -> Iterator[Connection]:
    """A transaction; one that writes waits for others that do, and then has seen all of theirs.

    Raises:
        RegistryError: the database does not answer, or is locked for too long.
    """
    try:
        with engine.connect() as connection:
            connection.execution_options(**{_WRITING: writing})
            with connection.begin():
                if writing and engine.dialect.name == "postgresql":
                    connection.execute(text(f"LOCK TABLE {EVENTS.name} IN SHARE ROW EXCLUSIVE MODE"))
                yield connection
    except OperationalError as error:
        raise RegistryError(f"the promotion log at {masked(str(engine.url))}: {masked(str(error.orig).strip())}") from None


def _sqlite(url: URL) -> Engine:
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": _WAIT_SECONDS})

    # Python's driver would begin transactions by itself, and too late: after the reads.
    @event.listens_for(engine, "connect")
    def _leave_transactions_to_us(driver: sqlite3.Connection, _: Any) -> None:
        driver.isolation_level = None

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get(_WRITING, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def _postgresql(url: URL) -> Engine:
    try:
        return create_engine(url, pool_pre_ping=True, pool_size=2, connect_args={"connect_timeout": _WAIT_SECONDS})
    except ModuleNotFoundError as error:
        raise RegistryError(f"{masked(str(url))}: no driver for PostgreSQL: {error}; install the extra [postgres]") from None


def _create(engine: Engine) -> None:
    """Create the table, with the events of an old log, where it is not there yet; all of it or nothing."""
    with transaction(engine) as connection:
        if inspect(connection).has_table(EVENTS.name):
            return
    with transaction(engine, writing=engine.dialect.name == "sqlite") as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(_CREATING)))
        if inspect(connection).has_table(EVENTS.name):
            return
        EVENTS.create(connection)
        if engine.dialect.name == "sqlite" and engine.url.database:
            _copy_old(connection, Path(engine.url.database).with_name(OLD_LOG))


def _copy_old(connection: Connection, path: Path) -> None:
    """Take over the events of an old log, under their ids; the file stays as it is."""
    if not path.is_file():
        return
    names = ("id", "time", "model", "action", "actor", "reason", "from_version", "to_version", "sha256", "gates")
    old = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        rows = old.execute(f"SELECT {', '.join(names)} FROM events ORDER BY id").fetchall()
    except sqlite3.DatabaseError as error:
        raise RegistryError(f"{path}: expected the promotion log of an earlier version: {error}") from None
    finally:
        old.close()
    for row in rows:
        values = dict(zip(names, row, strict=True))
        time = stamp(datetime.fromisoformat(values["time"]))
        connection.execute(insert(EVENTS).values(values | {"time": time, "details": json.dumps({})}))


def stamp(time: datetime) -> str:
    """A time as the table holds it: in UTC, and all equally long, so that their order is that of the texts."""
    return time.astimezone(UTC).isoformat(timespec="microseconds")
