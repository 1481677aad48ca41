# SPDX-License-Identifier: Apache-2.0
"""What goes into the recommendation path and what comes out of it."""

from dataclasses import dataclass, field
from datetime import datetime

from recsys.bundle.rules import Rules
from recsys.core.errors import RecsysError


class InvalidRequest(RecsysError):
    """A request that no model could answer; the message names the field, the value and what was expected."""


@dataclass(frozen=True)
class Request:
    """Recommend ``k`` items to a user, knowing what was known at ``at``.

    Attributes:
        user_id: any string; an unknown user is a new one.
        k: 1 or more.
        at: the time of the request, with a time zone.
        explain: whether to name the events of the history that mattered.
        rules: of the list; where they say nothing, those of the bundle hold.
    """

    user_id: str
    k: int
    at: datetime
    explain: bool = False
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InvalidRequest(f"k: expected 1 or more, got {self.k}")
        if not self.user_id:
            raise InvalidRequest("user_id: expected a non-empty string, got ''")
        if self.at.tzinfo is None:
            raise InvalidRequest(f"at: expected a time with a time zone, got {self.at.isoformat()}")


@dataclass(frozen=True)
class Reason:
    """An event of the history, and by how much the score falls when it is taken away."""

    item_id: str
    weight: float


@dataclass(frozen=True)
class Scored:
    """One item of a list.

    Attributes:
        item_id: the item.
        score: what the list is sorted by.
        log_probability: the retriever's, over the live catalogue.
        probability: the ranker's, for the task of the bundle's settings.
        reasons: the events that raise the score most, the strongest first.
    """

    item_id: str
    score: float
    log_probability: float
    probability: float
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True)
class Response:
    """The answer to one request.

    Attributes:
        flags: what the reader of the list should know: ``new_user`` (no history), ``short_list`` (fewer than k live unseen items).
    """

    user_id: str
    items: tuple[Scored, ...]
    bundle: str
    flags: tuple[str, ...] = field(default=())
