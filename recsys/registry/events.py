# SPDX-License-Identifier: Apache-2.0
"""The lines of the promotion log."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from recsys.core.config import Config

Action = Literal["register", "validate", "shadow", "canary", "promote", "rollback", "withdraw", "retire", "remove", "refuse"]


class Event(Config):
    """One line of the log.

    Attributes:
        id: grows with every event of the database.
        time: UTC.
        model: the registered model.
        action: what was done; `recsys.registry.states` says which state it leads to.
        actor: who asked for it.
        reason: why.
        from_version: the champion before the event.
        to_version: the version that the event is about; after ``promote`` and ``rollback`` it is the champion.
        sha256: of the version's bundle.
        gates: what each gate found, where gates were run.
        details: the rest, such as the percent of a canary, an override, or the comparison that the gates looked at.
    """

    id: int
    time: datetime
    model: str
    action: Action
    actor: str
    reason: str
    from_version: int | None
    to_version: int
    sha256: str
    gates: list[dict[str, Any]]
    details: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """An event that is to be appended; the log adds who, when, and who was champion. For the attributes see `Event`."""

    action: Action
    version: int
    sha256: str
    reason: str
    gates: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
