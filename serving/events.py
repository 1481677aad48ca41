# SPDX-License-Identifier: Apache-2.0
"""Events that come to the server itself, between two runs of the batch road: held here, or written to the online store.

An event is known by its ``event_id``. What came by the batch road is known by user, item and time, or by its ``ingest_seq``, and
counts once, whichever came first.
"""

import hashlib
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

import pyarrow as pa

from feature_store.compiled import CompiledView, compile_view
from feature_store.definitions import TIMES, FeatureRepo
from feature_store.materialize import append
from feature_store.online import OnlineStore
from feature_store.online.base import Snapshot
from feature_store.online.reader import Stored
from recsys.core.errors import unknown
from recsys.core.schema import AVAILABLE_TIME, EVENT_TIME, INGEST_SEQ, ITEM, USER
from recsys.core.tombstones import Tombstones
from recsys.inference.request import InvalidRequest

TYPE = "event_type"
"""The column of an event's type, where features read one."""
_NUMBERS = 1 << 62

Value = bool | int | float | str | None


@dataclass(frozen=True)
class Event:
    """One event of a user.

    Attributes:
        event_id: by which the same event is known when it is sent again.
        user_id: whose it is.
        item_id: what it is about.
        time: when it happened, with a time zone.
        event_type: what happened, where features read the column `TYPE`.
        values: by the columns of the events' source, such as a rating.
        ingest_seq: the number that the log gave it, where it has one already.
        received: when it came here; from then on it counts. Not compared.
    """

    event_id: str
    user_id: str
    item_id: str
    time: datetime
    event_type: str | None = None
    values: Mapping[str, Value] = field(default_factory=dict)
    ingest_seq: int | None = None
    received: datetime = field(default_factory=lambda: datetime.now(UTC), compare=False)

    @property
    def number(self) -> int:
        """Its ``ingest_seq``; where the log gave none, one made of its id."""
        if self.ingest_seq is not None:
            return self.ingest_seq
        return int.from_bytes(hashlib.sha256(self.event_id.encode()).digest()[:8]) % _NUMBERS

    def key(self, view: CompiledView) -> str:
        """The id of a view's entity."""
        return self.user_id if view.view.entity == USER else self.item_id


class Events(Protocol):
    """Where a bundle's events go."""

    def add(self, event: Event) -> bool:
        """Take an event; whether it is a new one.

        Raises:
            InvalidRequest: a value is of no column that features read, or of another type; or another event has the same id.
            FeatureStoreError: it cannot be written.
        """
        ...


class EventViews:
    """What a repo's features read of events of users with items.

    Args:
        repo: the definitions.

    Attributes:
        source: of these events.
        all: the views over this source.
        views: over this source, but those with tiles, to which events are not added here: what was added to a tile cannot be taken
            back when the event comes again.
        history: the view by which it is told whether an event has come already.

    Raises:
        InvalidRequest: no view holds the items of users one by one.
    """

    def __init__(self, repo: FeatureRepo) -> None:
        compiled = [compile_view(repo, view.name) for view in repo.views]
        of_events = [view for view in compiled if view.source.kind == "events" and {USER, ITEM} <= set(view.source.keys)]
        histories = [view for view in of_events if view.view.tile is None and view.view.entity == USER and ITEM in view.columns.by_name]
        if not histories:
            raise InvalidRequest("events: no view of the bundle's features holds the items of users")
        self.history = histories[0]
        self.source = self.history.source.name
        self.all = [view for view in of_events if view.source.name == self.source]
        self.views = {view.view.name: view for view in self.all if view.view.tile is None}

    def check(self, event: Event) -> None:
        """Hold that features can read an event; see `Events.add`."""
        known = {column.name for view in self.all for column in view.columns.columns} - {USER, ITEM, TYPE, *TIMES}
        for name in event.values:
            if name not in known:
                raise InvalidRequest(f"values: {unknown('column', name, known)}")
        for view in self.all:
            self.table(view, [event])

    def table(self, view: CompiledView, events: Iterable[Event]) -> pa.Table:
        """Events as rows of a view's source."""
        rows = [_row(event) for event in events]
        columns = {}
        for column in view.columns.columns:
            given = [row.get(column.name) for row in rows]
            try:
                columns[column.name] = pa.array(given, column.arrow)
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                raise InvalidRequest(f"values: {column.name}: expected {column.arrow}, got {repr(given[0])[:100]}") from None
        return pa.table(columns)

    def arrived(self, snapshot: Snapshot, events: Iterable[Event]) -> set[str]:
        """The ids of those of some events that a store has by now."""
        events = list(events)
        users = sorted({event.user_id for event in events})
        (log,) = Stored(snapshot, (self.history,), pa.array(users, pa.string())).logs()
        rows = log.rows.select([ITEM, EVENT_TIME, INGEST_SEQ]).to_pylist()  # type: ignore[union-attr]
        found: set[tuple[object, ...]] = set()
        for place, user in enumerate(log.entities.to_pylist()):
            for row in rows[log.offsets[place] : log.offsets[place + 1]]:  # type: ignore[union-attr]
                found |= {(user, row[ITEM], row[EVENT_TIME]), (user, row[INGEST_SEQ])}
        return {e.event_id for e in events if not found.isdisjoint({(e.user_id, e.item_id, e.time), (e.user_id, e.number)})}


class Held:
    """Events in the memory of this process, whichever bundle answers. The oldest give way.

    Args:
        most: how many are held.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._given: OrderedDict[str, Event] = OrderedDict()
        self._of: dict[str, dict[str, dict[str, Event]]] = {USER: defaultdict(dict), ITEM: defaultdict(dict)}

    def add(self, event: Event) -> bool:
        """See `Events.add`."""
        with self._lock:
            if (before := self._given.get(event.event_id)) is not None:
                _require_same(before, event)
                return False
            self._given[event.event_id] = event
            self._of[USER][event.user_id][event.event_id] = event
            self._of[ITEM][event.item_id][event.event_id] = event
            if len(self._given) > self._most:
                self._drop(self._given.popitem(last=False)[1])
            return True

    def of(self, entity: str, key: str) -> list[Event]:
        """The events of a user or of an item."""
        with self._lock:
            return list(self._of[entity].get(key, {}).values())

    def _drop(self, event: Event) -> None:
        for entity, key in ((USER, event.user_id), (ITEM, event.item_id)):
            self._of[entity][key].pop(event.event_id, None)
            if not self._of[entity][key]:
                del self._of[entity][key]


@dataclass(frozen=True)
class HeldEvents:
    """See `Events`: those of a bundle whose store is read only (`serving.overlaid.OverlaidStore`); ``forgotten`` as in `StoredEvents`."""

    views: EventViews
    held: Held
    forgotten: Callable[[], Tombstones] | None = None

    def add(self, event: Event) -> bool:
        """See `Events.add`."""
        self.views.check(event)
        _require_known(event, self.forgotten)
        return self.held.add(event)


class StoredEvents:
    """See `Events`: written to the online store, for all who read it.

    Args:
        repo: the definitions.
        store: to which it may be written.
        forgotten: gives the users of whom nothing is taken, as of now.
    """

    def __init__(self, repo: FeatureRepo, store: OnlineStore, forgotten: Callable[[], Tombstones] | None = None) -> None:
        self._repo, self._store, self._forgotten = repo, store, forgotten
        self._views = EventViews(repo)
        self._turn = threading.Lock()

    def add(self, event: Event) -> bool:
        """See `Events.add`. The event comes again by the batch road with its ``ingest_seq`` (`feature_store.materialize.append`)."""
        self._views.check(event)
        _require_known(event, self._forgotten)
        with self._turn:
            with self._store.snapshot() as snapshot:
                if self._views.arrived(snapshot, [event]):
                    return False
            columns = {column.name: column for view in self._views.all for column in view.columns.columns}
            row = _row(event)
            table = pa.table({name: pa.array([row.get(name)], column.arrow) for name, column in columns.items()})
            append(self._repo, self._views.source, table, self._store)
        return True


def _row(event: Event) -> dict[str, object]:
    own = {USER: event.user_id, ITEM: event.item_id, EVENT_TIME: event.time, AVAILABLE_TIME: event.received, INGEST_SEQ: event.number}
    return {TYPE: event.event_type, **event.values, **own}


def _require_known(event: Event, forgotten: Callable[[], Tombstones] | None) -> None:
    if forgotten is not None and event.user_id in forgotten():
        raise InvalidRequest("user_id: no events are taken of a user who was forgotten")


def _require_same(before: Event, event: Event) -> None:
    if before != event:
        raise InvalidRequest(f"event_id: {event.event_id!r} was given before, to another event")
