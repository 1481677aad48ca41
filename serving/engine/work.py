# SPDX-License-Identifier: Apache-2.0
"""What goes into the engine and what comes out of it: requests with deadlines, answers with flags, rejections with reasons."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType

from recsys.core.deadline import Deadline, RejectReason
from recsys.inference.recommender import Ranked, Users
from recsys.inference.request import Request, Response
from serving.engine.loaded import Loaded

CACHED_FEATURES = "cached_features"
RETRIEVER_ONLY = "retriever_only"
POPULAR = "popular"
NO_REASONS = "no_reasons"
FALLBACKS = (CACHED_FEATURES, RETRIEVER_ONLY, POPULAR, NO_REASONS)
"""The flags that say what was left out to be in time."""
FLAGS = (*FALLBACKS, "new_user", "short_list")
"""Every flag of an answer."""

STATUS = MappingProxyType(
    {
        RejectReason.INVALID_INPUT: 422,
        RejectReason.QUEUE_FULL: 429,
        RejectReason.CANCELLED: 499,
        RejectReason.INTERNAL: 500,
        RejectReason.UNAUTHORIZED: 401,
        RejectReason.RATE_LIMITED: 429,
        RejectReason.DEPENDENCY: 503,
        RejectReason.DEADLINE_BEFORE_START: 504,
        RejectReason.DEADLINE_IN_STAGE: 504,
    }
)


class Rejected(Exception):
    """A request that gets no answer.

    Args:
        reason: one of the fixed set.
        message: a sentence for the caller.
        retry_after: seconds after which it is worth asking again, where that is known.
    """

    def __init__(self, reason: RejectReason, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason, self.message, self.retry_after = reason, message, retry_after

    @property
    def status(self) -> int:
        """The HTTP status of the reason."""
        return STATUS[self.reason]


@dataclass(frozen=True)
class Work:
    """One request to the engine.

    Attributes:
        request: who asks, for how many items, as of when.
        deadline: after which nobody waits for the answer.
        request_id: the caller's, or a made one.
        item_ids: the items to order; None to recommend from the whole catalogue.
    """

    request: Request
    deadline: Deadline
    request_id: str
    item_ids: tuple[str, ...] | None = None


@dataclass(frozen=True)
class FeatureAges:
    """How old the user's features are, in seconds.

    Attributes:
        cached: since they were read, where the store could not answer and the last ones were used; else None.
        newest_event: since the user's newest event; None where there is none, or the features do not say.
    """

    cached: float | None = None
    newest_event: float | None = None


@dataclass(frozen=True)
class Answer:
    """What the engine answers.

    Attributes:
        response: the list, with all flags.
        loaded: the bundle that made it, alone.
        stages: seconds by stage, of those that there were: ``queue``, ``features``, ``retrieve``, ``items``, ``rank``, ``respond``,
            ``explain``.
        ages: of the user's features.
        why: for each thing that was left out, where that happened and why; few different texts, see `serving.engine.ladder`.
    """

    response: Response
    loaded: Loaded
    stages: Mapping[str, float]
    ages: FeatureAges = field(default_factory=FeatureAges)
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class Served:
    """The trace of one answer, for a log of decisions.

    Of an answer that was not ranked, such as a popular list, ``users`` and ``ranked`` are None.

    Attributes:
        request_id: see `Work`.
        time: when it was answered, UTC.
        request: see `Work`.
        deadline: see `Work`.
        loaded: the bundle.
        users: the user, with the features that the models read, in one row.
        ranked: the candidates, their item features and both models' opinions, in one row.
        response: what was answered.
        flags: of the response.
        stages: see `Answer`.
        given: whether the caller gave the candidates (``/v1/rank``).
    """

    request_id: str
    time: datetime
    request: Request
    deadline: Deadline
    loaded: Loaded
    users: Users | None
    ranked: Ranked | None
    response: Response
    flags: tuple[str, ...]
    stages: Mapping[str, float]
    given: bool
