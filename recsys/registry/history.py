# SPDX-License-Identifier: Apache-2.0
"""The promotion log: who put which bundle live, when, on what evidence. Append-only, and the truth of which an alias is a projection."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from recsys.core.config import Config
from recsys.core.errors import RegistryError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time TEXT NOT NULL,
    model TEXT NOT NULL,
    action TEXT NOT NULL CHECK (action IN ('promote', 'refuse', 'rollback')),
    actor TEXT NOT NULL,
    reason TEXT NOT NULL,
    from_version INTEGER,
    to_version INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    gates TEXT NOT NULL
) STRICT;
CREATE TRIGGER IF NOT EXISTS events_no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'the promotion log is append-only'); END;
CREATE TRIGGER IF NOT EXISTS events_no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'the promotion log is append-only'); END;
"""
_COLUMNS = ("id", "time", "model", "action", "actor", "reason", "from_version", "to_version", "sha256", "gates")


class Event(Config):
    """One line of the log. After ``promote`` and ``rollback`` the champion is ``to_version``; ``refuse`` leaves it as it was."""

    id: int
    time: datetime
    model: str
    action: Literal["promote", "refuse", "rollback"]
    actor: str
    reason: str
    from_version: int | None
    to_version: int
    sha256: str
    gates: list[dict[str, Any]]


class PromotionLog:
    """An append-only log in one SQLite file; writers are serialised by its lock."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        with self._connect() as connection:
            connection.executescript(_SCHEMA)

    def append(
        self,
        *,
        model: str,
        action: Literal["promote", "refuse", "rollback"],
        actor: str,
        reason: str,
        to_version: int,
        sha256: str,
        expected: int | None,
        gates: list[dict[str, Any]],
    ) -> Event:
        """Append one event if the champion still is ``expected`` (compare and set), in one transaction.

        Raises:
            RegistryError: another promotion came first; names the champion that was found.
        """
        with self._connect() as connection:
            connection.execute("BEGIN IMMEDIATE")
            current = self._champion(connection, model)
            if action != "refuse" and (current.to_version if current else None) != expected:
                found = current.to_version if current else "none"
                raise RegistryError(f"{model}: expected champion {expected or 'none'}, but it is {found}: somebody promoted meanwhile")
            values = (
                datetime.now(UTC).isoformat(), model, action, actor, reason,
                current.to_version if current else None, to_version, sha256, json.dumps(gates),
            )  # fmt: skip
            cursor = connection.execute(
                "INSERT INTO events (time, model, action, actor, reason, from_version, to_version, sha256, gates)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )
            row = connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM events WHERE id = ?", (cursor.lastrowid,)).fetchone()
        return _event(row)

    def events(self, model: str) -> list[Event]:
        """All events of a model, the oldest first."""
        with self._connect() as connection:
            rows = connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM events WHERE model = ? ORDER BY id", (model,)).fetchall()
        return [_event(row) for row in rows]

    def champion(self, model: str, at: datetime | None = None) -> Event | None:
        """The event that made today's champion, or the champion of the time ``at``; None before the first promotion."""
        with self._connect() as connection:
            return self._champion(connection, model, at)

    def previous(self, model: str) -> Event | None:
        """The event that made the champion before today's, which a rollback restores."""
        champion = self.champion(model)
        if champion is None or champion.from_version is None:
            return None
        made = [e for e in self.events(model) if e.action != "refuse" and e.to_version == champion.from_version]
        return made[-1] if made else None

    @staticmethod
    def _champion(connection: sqlite3.Connection, model: str, at: datetime | None = None) -> Event | None:
        row = connection.execute(
            f"SELECT {', '.join(_COLUMNS)} FROM events WHERE model = ? AND action != 'refuse' AND (? IS NULL OR time <= ?)"
            " ORDER BY id DESC LIMIT 1",
            (model, *([at.astimezone(UTC).isoformat()] * 2 if at else (None, None))),
        ).fetchone()
        return _event(row) if row else None

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._path, timeout=30, isolation_level=None)
        try:
            yield connection
            if connection.in_transaction:
                connection.commit()
        finally:
            connection.close()


def _event(row: tuple[Any, ...]) -> Event:
    values = dict(zip(_COLUMNS, row, strict=True))
    return Event(**{**values, "gates": json.loads(values["gates"])})
