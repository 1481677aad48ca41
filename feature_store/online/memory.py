# SPDX-License-Identifier: Apache-2.0
"""An online store in the memory of this process: for tests, notebooks and offline evaluation of the online path."""

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from feature_store.online.base import OnlineStore, Snapshot, Transaction, ViewState
from recsys.core.components import register
from recsys.core.config import Config as BaseConfig


@dataclass(frozen=True)
class _Content:
    """Never changed once it is the store's."""

    id: int = 0
    states: dict[str, ViewState] = field(default_factory=dict)
    values: dict[str, dict[str, bytes]] = field(default_factory=dict)


class _MemorySnapshot(Snapshot):
    def __init__(self, content: _Content) -> None:
        self.id = content.id
        self._states = content.states
        self._values = content.values

    def states(self) -> Mapping[str, ViewState]:
        return self._states

    def multi_get(self, wanted: Mapping[str, Sequence[str]]) -> dict[str, list[bytes | None]]:
        return {view: [self._values.get(view, {}).get(entity) for entity in entities] for view, entities in wanted.items()}

    def scan(self, view: str) -> Iterator[tuple[str, bytes]]:
        return iter(sorted(self._values.get(view, {}).items()))


class _MemoryTransaction(_MemorySnapshot, Transaction):
    """Writes to copies: of the outer dictionaries at once, of a view's values when it is first written to."""

    def __init__(self, content: _Content) -> None:
        super().__init__(content)
        self._states = dict(content.states)
        self._values = dict(content.values)
        self._copied: set[str] = set()

    def write(self, view: str, values: Mapping[str, bytes]) -> None:
        if view not in self._copied:
            self._values[view] = dict(self._values.get(view, {}))
            self._copied.add(view)
        self._values[view].update(values)

    def clear(self, view: str) -> None:
        self._values[view] = {}
        self._copied.add(view)
        self._states.pop(view, None)

    def set_state(self, view: str, state: ViewState) -> None:
        self._states[view] = state

    def content(self) -> _Content:
        return _Content(self.id + 1, self._states, self._values)


@register("online_store", "memory")
class MemoryStore(OnlineStore):
    """See the module."""

    class Config(BaseConfig):
        """Nothing to configure."""

        name: Literal["memory"] = "memory"

    def __init__(self, config: Config | None = None) -> None:
        self._content = _Content()
        self._writing = threading.Lock()

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """See `OnlineStore.snapshot`."""
        yield _MemorySnapshot(self._content)

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """See `OnlineStore.transaction`."""
        with self._writing:
            transaction = _MemoryTransaction(self._content)
            yield transaction
            self._content = transaction.content()

    def forget(self, views: Collection[str], entity: str) -> tuple[str, ...]:
        """See `OnlineStore.forget`."""
        with self._writing:
            content = self._content
            found = tuple(sorted(view for view in views if entity in content.values.get(view, {})))
            without = {view: {key: value for key, value in content.values[view].items() if key != entity} for view in found}
            self._content = _Content(content.id + bool(found), content.states, content.values | without)
        return found

    def close(self) -> None:
        """Nothing to release."""
