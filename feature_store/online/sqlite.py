# SPDX-License-Identifier: Apache-2.0
"""An embedded online store in one SQLite file, in WAL mode: one process writes while others read.

A snapshot is SQLite's own: a read transaction goes on seeing the commit that it began with. A transaction of the store is one of
SQLite's, so the data, the watermarks and the new snapshot number become visible together, or, if the process dies, not at all.
"""

import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from feature_store.online.base import FeatureStoreError, OnlineStore, Snapshot, Transaction, ViewState
from recsys.core.components import register
from recsys.core.config import Config as BaseConfig

FORMAT = 1
BUSY_SECONDS = 30.0
MOST_PARAMETERS = 30_000
"""How many entities one statement asks for; SQLite itself allows 32,766 parameters."""

_TABLES = """
CREATE TABLE IF NOT EXISTS store (one INTEGER PRIMARY KEY CHECK (one = 1), snapshot INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS view (name TEXT PRIMARY KEY, version TEXT NOT NULL, watermark INTEGER);
CREATE TABLE IF NOT EXISTS log (view TEXT NOT NULL, entity TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (view, entity));
INSERT OR IGNORE INTO store VALUES (1, 0);
"""


class _SQLiteSnapshot(Snapshot):
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        # The first read of a transaction fixes what it sees.
        self.id = int(connection.execute("SELECT snapshot FROM store").fetchone()[0])

    def states(self) -> Mapping[str, ViewState]:
        rows = self._connection.execute("SELECT name, version, watermark FROM view")
        return {name: ViewState(version, watermark) for name, version, watermark in rows}

    def multi_get(self, wanted: Mapping[str, Sequence[str]]) -> dict[str, list[bytes | None]]:
        return {view: self._get(view, entities) for view, entities in wanted.items()}

    def _get(self, view: str, entities: Sequence[str]) -> list[bytes | None]:
        values: dict[str, bytes] = {}
        for first in range(0, len(entities), MOST_PARAMETERS):
            part = entities[first : first + MOST_PARAMETERS]
            marks = ",".join("?" * len(part))
            values.update(self._connection.execute(f"SELECT entity, value FROM log WHERE view = ? AND entity IN ({marks})", (view, *part)))
        return [values.get(entity) for entity in entities]

    def scan(self, view: str) -> Iterator[tuple[str, bytes]]:
        yield from self._connection.execute("SELECT entity, value FROM log WHERE view = ? ORDER BY entity", (view,))


class _SQLiteTransaction(_SQLiteSnapshot, Transaction):
    def write(self, view: str, values: Mapping[str, bytes]) -> None:
        self._connection.executemany(
            "INSERT INTO log VALUES (?, ?, ?) ON CONFLICT (view, entity) DO UPDATE SET value = excluded.value",
            ((view, entity, value) for entity, value in values.items()),
        )

    def clear(self, view: str) -> None:
        self._connection.execute("DELETE FROM log WHERE view = ?", (view,))
        self._connection.execute("DELETE FROM view WHERE name = ?", (view,))

    def set_state(self, view: str, state: ViewState) -> None:
        self._connection.execute("INSERT OR REPLACE INTO view VALUES (?, ?, ?)", (view, state.version, state.watermark))


@register("online_store", "sqlite")
class SQLiteStore(OnlineStore):
    """See the module.

    Raises:
        FeatureStoreError: from every method, where the file is absent (when it is only to be read), damaged or locked for too long.
    """

    class Config(BaseConfig):
        """Where the store is.

        Attributes:
            path: the file; it is created unless ``read_only``.
            read_only: open it for reading, as a server does.
        """

        name: Literal["sqlite"] = "sqlite"
        path: Path
        read_only: bool = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self._idle: list[sqlite3.Connection] = []
        if config.read_only and not config.path.is_file():
            raise FeatureStoreError(f"online store {config.path}: no such file; materialise the features first")
        if not config.read_only:
            config.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connection() as connection:
            if not config.read_only:
                self._create(connection)
            found = connection.execute("PRAGMA user_version").fetchone()[0]
            if found != FORMAT:
                raise FeatureStoreError(f"online store {config.path}: expected format {FORMAT}, got {found}")

    @classmethod
    def open(cls, path: Path) -> "SQLiteStore":
        """The store at ``path``, for reading only."""
        return cls(cls.Config(path=path, read_only=True))

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """See `OnlineStore.snapshot`."""
        with self._connection() as connection:
            connection.execute("BEGIN")
            yield _SQLiteSnapshot(connection)

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """See `OnlineStore.transaction`."""
        if self.config.read_only:
            raise FeatureStoreError(f"online store {self.config.path} was opened for reading only")
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield _SQLiteTransaction(connection)
            connection.execute("UPDATE store SET snapshot = snapshot + 1")
            connection.execute("COMMIT")

    def forget(self, views: Collection[str], entity: str) -> tuple[str, ...]:
        """See `OnlineStore.forget`. The file is written anew, which takes as long as that, and the space of what was erased is given back.

        Raises:
            FeatureStoreError: see the class; and where somebody reads from a snapshot for so long that its content has to stay.
        """
        if self.config.read_only:
            raise FeatureStoreError(f"online store {self.config.path} was opened for reading only")
        with self._connection() as connection:
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("BEGIN IMMEDIATE")
            rows = connection.execute("SELECT view FROM log WHERE entity = ?", (entity,)).fetchall()
            found = tuple(sorted(view for (view,) in rows if view in views))
            connection.executemany("DELETE FROM log WHERE view = ? AND entity = ?", ((view, entity) for view in found))
            connection.execute("UPDATE store SET snapshot = snapshot + ?", (bool(found),))
            connection.execute("COMMIT")
            # Older pages of the file and of its log may hold it as well, also those of a call that died: both are rewritten, found or not.
            connection.execute("VACUUM")
            (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise FeatureStoreError(f"online store {self.config.path}: a snapshot is still read from; forget again once that has ended")
        return found

    def close(self) -> None:
        """Close all connections that are not in use."""
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection that nobody else uses meanwhile. A transaction that was not committed by the end is rolled back."""
        try:
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._connect()
            try:
                yield connection
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                self._idle.append(connection)
        except sqlite3.Error as error:
            raise FeatureStoreError(f"online store {self.config.path}: {error}") from error

    def _connect(self) -> sqlite3.Connection:
        uri = f"{self.config.path.resolve().as_uri()}?mode={'ro' if self.config.read_only else 'rwc'}"
        return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)

    def _create(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
            connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {FORMAT}; COMMIT;")
