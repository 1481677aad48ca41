# SPDX-License-Identifier: Apache-2.0
"""A request inside the engine: what it waits for, what is known for it so far, and who may answer it."""

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from opentelemetry.trace import INVALID_SPAN, Span

from recsys.core.deadline import Deadline
from serving.engine.loaded import Loaded
from serving.engine.work import Answer, FeatureAges, Work

_LARGEST_RESERVE = 0.25


def reserve_of(deadline: Deadline, reserve: float, now: float) -> float:
    """Seconds that are kept of a deadline for the fallback list: ``reserve``, but of a short one not all."""
    return min(reserve, _LARGEST_RESERVE * max(0.0, deadline.at - now))


@dataclass(eq=False)
class Entry:
    """One request, from when it is taken in until it is answered. It is answered once: by whoever claims it first.

    Attributes:
        work: what was asked.
        loaded: the bundle that answers, the one that was live when it came.
        rows: how many candidates it has.
        item_rows: int64 ``[rows]``, the catalogue rows to order; None to recommend.
        reserve: seconds before the deadline that are kept for a fallback list.
        span: what tells a trace of it.
        arrived: monotonic seconds.
        future: the answer, or a `Rejected`.
        started: monotonic seconds at which its batch was formed.
        known: what a fallback list can be made of.
    """

    work: Work
    loaded: Loaded
    rows: int
    item_rows: np.ndarray | None
    reserve: float
    span: Span = INVALID_SPAN
    arrived: float = field(default_factory=time.monotonic)
    future: "Future[Answer]" = field(default_factory=Future)
    started: float | None = None
    known: "Known" = field(default_factory=lambda: Known())
    _claimed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.reserve = reserve_of(self.work.deadline, self.reserve, self.arrived)

    @property
    def cutoff(self) -> float:
        """The monotonic second after which no stage begins for it."""
        return self.work.deadline.at - self.reserve

    @property
    def last_call(self) -> float:
        """The monotonic second at which it is answered with what is known, whatever is still being computed."""
        return self.work.deadline.at - 0.5 * self.reserve

    @property
    def gone(self) -> bool:
        """Whether nobody waits for it any more: it was answered, or its client has gone."""
        return self._claimed

    def claim(self) -> bool:
        """Whether the caller, the first to ask, is the one that answers."""
        with self._lock:
            first, self._claimed = not self._claimed, True
            return first

    def settle(self, outcome: "Answer | BaseException") -> None:
        """Hand the outcome to whoever waits; for the one that claimed it."""
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)

    def resolve(self, outcome: "Answer | BaseException") -> None:
        """Answer it, unless somebody has."""
        if self.claim():
            self.settle(outcome)


@dataclass
class Known:
    """What is known for a request so far, for a list in a hurry.

    Attributes:
        seen: int64, catalogue rows that the user is not to be shown again; None where that is not known.
        new_user: whether the user has no history.
        candidates: catalogue rows and the retriever's log-probabilities, ``[C]`` each.
        answer: a whole answer that lacks its reasons only.
        ages: of the user's features.
        intervals: stages with the monotonic seconds at which they began and ended, in the order in which they ended.
        why: see `Answer`; of what was left out so far.
    """

    seen: np.ndarray | None = None
    new_user: bool = False
    candidates: tuple[np.ndarray, np.ndarray] | None = None
    answer: Answer | None = None
    ages: FeatureAges = field(default_factory=FeatureAges)
    intervals: list[tuple[str, float, float]] = field(default_factory=list)
    why: tuple[str, ...] = ()

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage."""
        took: dict[str, float] = {}
        for stage, began, ended in tuple(self.intervals):
            took[stage] = took.get(stage, 0.0) + ended - began
        return took
