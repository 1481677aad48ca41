# SPDX-License-Identifier: Apache-2.0
"""The promotion log: who put which bundle where, when, on what evidence. Append-only, and the truth of which an alias is a projection."""

import json
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import Connection, Row, func, insert, select

from recsys.core.errors import RegistryError
from recsys.registry.database import EVENTS, connect, stamp, transaction
from recsys.registry.events import Entry, Event
from recsys.registry.states import Standing, State, check


class PromotionLog:
    """The log in the database of MLflow's store.

    Args:
        address: the database's URL, ``sqlite:///...`` or ``postgresql://...``. The table is created where it is absent, with the events of
            the file ``promotions.db`` beside the SQLite database, in which an earlier version kept the log.

    Raises:
        RegistryError: from every method, where the database does not answer.
    """

    def __init__(self, address: str) -> None:
        self._engine = connect(address)

    def append(
        self, model: str, *entries: Entry, actor: str, expected: int | Literal["any"] | None = "any", after: int | None = None
    ) -> list[Event]:
        """Append events, all or none, if each is legal in its turn, in one transaction (compare and set).

        Args:
            model: the registered model.
            entries: what is done, in order.
            actor: who does it.
            expected: the champion that the decision was made against; None for none.
            after: the id of the model's last event that the decision has seen (`latest_id`).

        Raises:
            RegistryError: the champion is another one, or the log has gone on, or an entry is not legal in its version's state.
        """
        with transaction(self._engine, writing=True) as connection:
            standing = _standing(connection, model)
            if expected != "any" and standing.champion != expected:
                found = standing.champion or "none"
                raise RegistryError(f"{model}: expected champion {expected or 'none'}, but it is {found}: somebody promoted meanwhile")
            if after is not None and standing.latest != after:
                raise RegistryError(f"{model}: expected event {after} to be the last, but there is {standing.latest}: the log has gone on")
            return [_append(connection, model, standing, entry, actor) for entry in entries]

    def events(self, model: str) -> list[Event]:
        """All events of a model, the oldest first."""
        with transaction(self._engine) as connection:
            return [_event(row) for row in connection.execute(select(EVENTS).where(EVENTS.c.model == model).order_by(EVENTS.c.id))]

    def event(self, identity: int) -> Event:
        """The event of an id.

        Raises:
            RegistryError: there is none.
        """
        with transaction(self._engine) as connection:
            row = connection.execute(select(EVENTS).where(EVENTS.c.id == identity)).one_or_none()
        if row is None:
            raise RegistryError(f"the promotion log has no event {identity}")
        return _event(row)

    def latest_id(self, model: str) -> int:
        """The id of a model's last event, 0 if there is none. One look into an index: ask it often, and the rest only when it has grown."""
        with transaction(self._engine) as connection:
            found = connection.execute(select(func.max(EVENTS.c.id)).where(EVENTS.c.model == model)).scalar_one()
        return int(found or 0)

    def sha256(self, model: str, version: int) -> str | None:
        """The hash of a version's bundle; None if the log has no event of it."""
        query = select(EVENTS.c.sha256).where(EVENTS.c.model == model, EVENTS.c.to_version == version).order_by(EVENTS.c.id).limit(1)
        with transaction(self._engine) as connection:
            return connection.execute(query).scalar_one_or_none()

    def standing(self, model: str, at: datetime | None = None) -> Standing:
        """Where all versions stand now, or stood at the time ``at``."""
        with transaction(self._engine) as connection:
            return _standing(connection, model, at)

    def state(self, model: str, version: int) -> State | None:
        """Where a version stands; None if the log has no event of it."""
        return self.standing(model).states.get(version)

    def champion(self, model: str) -> Event | None:
        """The event that made today's champion; None before the first promotion."""
        standing = self.standing(model)
        return self._crowning(standing, standing.champion)

    def champion_at(self, model: str, time: datetime) -> Event | None:
        """The event that had made the champion of that time; None before the first promotion."""
        standing = self.standing(model, time)
        return self._crowning(standing, standing.champion)

    def previous(self, model: str) -> Event | None:
        """The event that made the champion before today's, which a rollback restores."""
        standing = self.standing(model)
        return self._crowning(standing, standing.previous)

    def canary(self, model: str) -> Event | None:
        """The event that made the canary; ``details["percent"]`` is its share of the users."""
        return self._only(model, State.CANARY)

    def shadow(self, model: str) -> Event | None:
        """The event that made the shadow."""
        return self._only(model, State.SHADOW)

    def challenger(self, model: str) -> Event | None:
        """The event that made the canary, or else the shadow."""
        return self.canary(model) or self.shadow(model)

    def _crowning(self, standing: Standing, version: int | None) -> Event | None:
        return None if version is None else self.event(standing.crowned[version])

    def _only(self, model: str, state: State) -> Event | None:
        standing = self.standing(model)
        version = standing.only(state)
        return None if version is None else self.event(standing.since[version])


def _standing(connection: Connection, model: str, at: datetime | None = None) -> Standing:
    query = select(EVENTS.c.id, EVENTS.c.action, EVENTS.c.to_version).where(EVENTS.c.model == model).order_by(EVENTS.c.id)
    if at is not None:
        query = query.where(EVENTS.c.time <= stamp(at))
    return Standing.after((identity, action, version) for identity, action, version in connection.execute(query))


def _append(connection: Connection, model: str, standing: Standing, entry: Entry, actor: str) -> Event:
    """Append one entry to the log and to the standing."""
    check(model, standing, entry.action, entry.version, override="override" in entry.details)
    values: dict[str, Any] = {
        "time": stamp(datetime.now(UTC)),
        "model": model,
        "action": entry.action,
        "actor": actor,
        "reason": entry.reason,
        "from_version": standing.champion,
        "to_version": entry.version,
        "sha256": entry.sha256,
        "gates": json.dumps(entry.gates, default=float),
        "details": json.dumps(entry.details, default=float),
    }
    event = _event(connection.execute(insert(EVENTS).values(values).returning(EVENTS)).one())
    standing.apply(event.id, entry.action, entry.version)
    return event


def _event(row: Row[Any]) -> Event:
    values = dict(row._mapping)
    return Event(**{**values, "gates": json.loads(values["gates"]), "details": json.loads(values["details"])})
