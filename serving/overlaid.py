# SPDX-License-Identifier: Apache-2.0
"""An online store that is only read, with the events that this process holds as if they had been written to it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np

from feature_store.compiled import CompiledView
from feature_store.log import Log, build_log, read_rows
from feature_store.materialize import with_events
from feature_store.online import FeatureStoreError, OnlineStore, Snapshot, Transaction, ViewState
from feature_store.online.packing import pack
from feature_store.online.reader import Stored
from serving.events import Event, EventViews, Held


class OverlaidStore(OnlineStore):
    """See the module. What the store below has by now of the held events counts as it is there, once.

    Args:
        base: the store below.
        views: what events change.
        held: the events.
    """

    def __init__(self, base: OnlineStore, views: EventViews, held: Held) -> None:
        self._base, self._views, self._held = base, views, held

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """See `OnlineStore.snapshot`."""
        with self._base.snapshot() as base:
            yield _OverlaidSnapshot(base, self._views, self._held)

    def transaction(self) -> AbstractContextManager[Transaction]:
        """Never: the store is for reading.

        Raises:
            FeatureStoreError: always.
        """
        raise FeatureStoreError("an online store under held events is for reading only")

    def forget(self, views: Collection[str], entity: str) -> tuple[str, ...]:
        """See `transaction`."""
        raise FeatureStoreError("an online store under held events is for reading only")

    def close(self) -> None:
        """See `OnlineStore.close`."""
        self._base.close()


class _OverlaidSnapshot(Snapshot):
    def __init__(self, base: Snapshot, views: EventViews, held: Held) -> None:
        self.id = base.id
        self._base, self._views, self._held = base, views, held

    def states(self) -> Mapping[str, ViewState]:
        return self._base.states()

    def scan(self, view: str) -> Iterator[tuple[str, bytes]]:
        """What is stored, without the events that are held."""
        return self._base.scan(view)

    def multi_get(self, wanted: Mapping[str, Sequence[str]]) -> dict[str, list[bytes | None]]:
        found = self._base.multi_get(wanted)
        held = {name: self._of(self._views.views[name], entities) for name, entities in wanted.items() if name in self._views.views}
        events = {event.event_id: event for own in held.values() for several in own.values() for event in several}
        if events:
            arrived = self._views.arrived(self._base, events.values())
            for name, own in held.items():
                fresh = [event for several in own.values() for event in several if event.event_id not in arrived]
                if fresh:
                    merged = self._merged(self._views.views[name], fresh)
                    found[name] = [merged.get(key, value) for key, value in zip(wanted[name], found[name], strict=True)]
        return found

    def _of(self, view: CompiledView, entities: Sequence[str]) -> dict[str, list[Event]]:
        by_entity = {key: self._held.of(view.view.entity, key) for key in entities}
        return {key: events for key, events in by_entity.items() if events}

    def _merged(self, view: CompiledView, events: Sequence[Event]) -> dict[str, bytes]:
        """By entity, what would be stored of it."""
        batch = build_log(view, read_rows(view, self._views.table(view, events)))
        (stored,) = Stored(self._base, (view,), batch.entities).logs()
        assert isinstance(stored, Log), "views with tiles are not among them"
        entities, offsets, rows = with_events(view, stored, batch)
        return dict(zip(entities.to_pylist(), pack(rows, np.asarray(offsets)), strict=True))
