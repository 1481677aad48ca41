# SPDX-License-Identifier: Apache-2.0
"""The log of catalogue changes: an append-only SQLite table that all processes of a host share."""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from recsys.core.errors import RecsysError
from serving.live.changes import Change, Wanted

_WAIT_SECONDS = 10
_REFUSAL = "the log of catalogue changes is append-only"
# SQLite fires no DELETE trigger for the row that INSERT OR REPLACE removes, hence the third.
_TABLE = f"""
CREATE TABLE IF NOT EXISTS catalogue_changes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, model TEXT NOT NULL, action TEXT NOT NULL, item_id TEXT NOT NULL,
    until TEXT, attributes TEXT NOT NULL, actor TEXT NOT NULL, reason TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS catalogue_changes_by_model ON catalogue_changes (model, id);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON catalogue_changes BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON catalogue_changes BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END;
CREATE TRIGGER IF NOT EXISTS no_replace BEFORE INSERT ON catalogue_changes
    WHEN EXISTS (SELECT 1 FROM catalogue_changes WHERE id = NEW.id) BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END;
"""


class ChangeLogError(RecsysError):
    """The log of catalogue changes cannot be read or written."""


class LogHasGoneOn(ChangeLogError):
    """Somebody else has changed the catalogue since."""


class ChangeLog:
    """See the module. May be used by any number of threads and processes.

    Args:
        path: the file; it is created where it is absent.

    Raises:
        ChangeLogError: from every method, where the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._connected() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_TABLE)

    def append(
        self, model: str, wanted: Sequence[Wanted], *, after: int, actor: str, reason: str, now: datetime | None = None
    ) -> list[Change]:
        """Append changes, all or none; they are on disk when this returns.

        Args:
            model: whose catalogue.
            wanted: the changes, in order.
            after: the id of the last change of the model that the caller has seen (compare and set).
            actor: who asks.
            reason: why.
            now: UTC; the present by default.

        Raises:
            LogHasGoneOn: there are later ones.
        """
        time = (now or datetime.now(UTC)).isoformat()
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            if (latest := _latest(connection, model)) != after:
                raise LogHasGoneOn(f"{model}: expected change {after} to be the last, but there is {latest}")
            for each in wanted:
                until = None if each.until is None else each.until.astimezone(UTC).isoformat()
                connection.execute(
                    "INSERT INTO catalogue_changes (time, model, action, item_id, until, attributes, actor, reason)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (time, model, each.action, each.item_id, until, json.dumps(each.attributes), actor, reason),
                )
            changes = _since(connection, model, after)
            connection.execute("COMMIT")
        return changes

    def since(self, model: str, after: int = 0) -> list[Change]:
        """The changes of a model with larger ids, the oldest first."""
        with self._connected() as connection:
            return _since(connection, model, after)

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path, timeout=_WAIT_SECONDS, isolation_level=None)) as connection:
                connection.execute("PRAGMA synchronous = FULL")
                yield connection
        except sqlite3.Error as error:
            raise ChangeLogError(f"{self._path}: {error}") from None


def _latest(connection: sqlite3.Connection, model: str) -> int:
    (found,) = connection.execute("SELECT max(id) FROM catalogue_changes WHERE model = ?", (model,)).fetchone()
    return int(found or 0)


def _since(connection: sqlite3.Connection, model: str, after: int) -> list[Change]:
    names = ("id", "time", "model", "action", "item_id", "until", "attributes", "actor", "reason")
    query = f"SELECT {', '.join(names)} FROM catalogue_changes WHERE model = ? AND id > ? ORDER BY id"
    rows = [dict(zip(names, row, strict=True)) for row in connection.execute(query, (model, after))]
    return [Change(**{**row, "attributes": json.loads(row["attributes"])}) for row in rows]
