# SPDX-License-Identifier: Apache-2.0
"""Changes of a catalogue, and where its items stand after some of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from recsys.core.config import Config
from recsys.inference.request import InvalidRequest

Action = Literal["add", "remove", "restore", "block", "unblock"]


class Wanted(Config):
    """A change that somebody asks for.

    Attributes:
        action: ``add`` an item that no bundle knows; ``remove`` an item until somebody will ``restore`` it; ``block`` it, for a time or
            until somebody will ``unblock`` it. An item is shown that is neither removed nor blocked.
        item_id: of which item.
        until: when a block ends; None for never.
        attributes: of an item that is added: columns of the bundle's table of items, such as its title.
    """

    action: Action
    item_id: str = Field(min_length=1, max_length=256)
    until: datetime | None = None
    attributes: dict[str, Any] = Field(default_factory=dict)


class Change(Wanted):
    """One line of the log.

    Attributes:
        id: grows with every change.
        time: UTC.
        model: the registered model whose catalogue it is.
        actor: who asked for it.
        reason: why.
    """

    id: int
    time: datetime
    model: str
    actor: str
    reason: str


@dataclass
class Standing:
    """Where a model's items stand after its changes.

    Attributes:
        added: attributes of the items that were added, in the order in which they were.
        removed: whether an item is removed, of those that were ever removed or restored.
        blocked: when the block of an item ends, of those that are blocked; None for never.
        latest: the id of the last change; 0 if there is none.
    """

    added: dict[str, dict[str, Any]] = field(default_factory=dict)
    removed: dict[str, bool] = field(default_factory=dict)
    blocked: dict[str, datetime | None] = field(default_factory=dict)
    latest: int = 0

    def apply(self, changes: Iterable[Change]) -> None:
        """Take further changes into account, the oldest first."""
        for change in changes:
            self.latest = change.id
            match change.action:
                case "add":
                    self.added.setdefault(change.item_id, change.attributes)
                case "remove" | "restore":
                    self.removed[change.item_id] = change.action == "remove"
                case "block":
                    self.blocked[change.item_id] = change.until
                case "unblock":
                    self.blocked.pop(change.item_id, None)

    def blocks(self, now: datetime) -> set[str]:
        """The items that are blocked now."""
        return {item for item, until in self.blocked.items() if until is None or now < until}

    def next_end(self, now: datetime) -> datetime | None:
        """When the next block ends by itself."""
        return min((until for until in self.blocked.values() if until is not None and now < until), default=None)


def check(wanted: Wanted, known: bool, now: datetime) -> None:
    """Hold that a change makes sense for an item that is, or is not, ``known`` to the catalogue.

    Raises:
        InvalidRequest: it does not; names the item and the field.
    """
    where = f"{wanted.action} {wanted.item_id!r}"
    if wanted.action == "add" and known:
        raise InvalidRequest(f"{where}: it is in the catalogue already; an item that was removed comes back by 'restore'")
    if wanted.action != "add" and not known:
        raise InvalidRequest(f"{where}: it is not in the catalogue")
    if wanted.attributes and wanted.action != "add":
        raise InvalidRequest(f"{where}: attributes: expected none, got {sorted(wanted.attributes)}")
    if wanted.until is not None:
        _check_end(where, wanted, wanted.until, now)


def _check_end(where: str, wanted: Wanted, until: datetime, now: datetime) -> None:
    if wanted.action != "block":
        raise InvalidRequest(f"{where}: until: expected for 'block' only, got {until.isoformat()}")
    if until.tzinfo is None or until <= now:
        raise InvalidRequest(f"{where}: until: expected a time to come with a time zone, got {until.isoformat()}")
