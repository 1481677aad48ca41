# SPDX-License-Identifier: Apache-2.0
"""What an online store must offer: versioned snapshots to read from, and transactions to write with.

A store keeps, for every view and entity, the packed rows of that entity (`feature_store.online.packing`), and for every view its
`ViewState`. It looks into none of them.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

from recsys.core.errors import RecsysError
from recsys.core.files import canonical_json


class FeatureStoreError(RecsysError):
    """An online store is absent, damaged, locked, or holds other versions of the features than are asked for."""


@dataclass(frozen=True)
class ViewState:
    """What is in the store of one view.

    Attributes:
        version: the view's version hash (`FeatureRepo.view_version`).
        watermark: the highest ``ingest_seq`` that was materialised; None without events, and for a static source.
    """

    version: str
    watermark: int | None


class Snapshot(ABC):
    """The content of a store at one moment, its first read at the latest; no later write shows in it.

    Attributes:
        id: the number of transactions that were committed before.
    """

    id: int

    @abstractmethod
    def states(self) -> Mapping[str, ViewState]:
        """The state of every view that was written."""

    @abstractmethod
    def multi_get(self, wanted: Mapping[str, Sequence[str]]) -> dict[str, list[bytes | None]]:
        """By view, the values of the entities that are wanted of it, in their order, None where there is none; one round trip for all."""

    @abstractmethod
    def scan(self, view: str) -> Iterator[tuple[str, bytes]]:
        """All entities of a view with their values, sorted by entity."""

    def digest(self) -> str:
        """A SHA-256 over all content. Equal content gives equal digests, whatever the store and however it came there."""
        digest = hashlib.sha256()
        for view, state in sorted(self.states().items()):
            digest.update(canonical_json([view, asdict(state)]))
            for entity, value in self.scan(view):
                digest.update(canonical_json([entity, len(value)]))
                digest.update(value)
        return digest.hexdigest()


class Transaction(Snapshot):
    """A snapshot that can be written to and reads its own writes. Nobody else sees them before the commit."""

    @abstractmethod
    def write(self, view: str, values: Mapping[str, bytes]) -> None:
        """Set the values of entities."""

    @abstractmethod
    def clear(self, view: str) -> None:
        """Remove all values and the state of a view."""

    @abstractmethod
    def set_state(self, view: str, state: ViewState) -> None:
        """Set the state of a view."""


class OnlineStore(ABC):
    """A key-value store with snapshots. Registered with ``@register("online_store", name)``; built from its ``Config``.

    All methods may be called from several threads. Readers never wait for a writer; writers take turns.
    """

    @abstractmethod
    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """The latest committed content when it is first read from, for the time of the context."""

    @abstractmethod
    def transaction(self) -> AbstractContextManager[Transaction]:
        """Write: everything is committed at once when the context ends, and nothing if it ends with an error."""

    @abstractmethod
    def forget(self, views: Collection[str], entity: str) -> tuple[str, ...]:
        """Erase an entity from some views: its values, those of earlier snapshots, and what files still hold of them.

        A snapshot that is read from meanwhile may still show it until its context ends, and no longer. Called again, also after a crash in
        the middle, it finds nothing and leaves no trace.

        Args:
            views: those of this kind of entity. (The same id may be that of another kind in other views.)
            entity: its id.

        Returns:
            The views that held it, sorted.
        """

    @abstractmethod
    def close(self) -> None:
        """Release files and connections."""
