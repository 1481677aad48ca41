# SPDX-License-Identifier: Apache-2.0
"""A bundle that answers some of the users, and is taken back by itself where it does worse than the champion."""

import logging
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from recsys.core.errors import RegistryError
from recsys.registry import Event
from serving.engine.loaded import Loaded
from serving.engine.threads import Repeating
from serving.engine.work import POPULAR, RETRIEVER_ONLY, Answer, Rejected
from serving.lanes.figures import Figures
from serving.lanes.lane import Lane
from serving.lanes.policy import CanaryPolicy, Verdict
from serving.lanes.shown import Shown
from serving.lanes.split import SALT, is_in, salt_of

log = logging.getLogger("serving")

ACTOR = "guardrail"
_SERVER_ERROR = 500


class Moves(Protocol):
    """What of a registry moves a canary; see `recsys.registry.Registry`."""

    def stage(
        self,
        model: str,
        version: int,
        to: Literal["shadow", "canary"],
        *,
        percent: float | None = None,
        actor: str | None = None,
        reason: str,
        details: Mapping[str, Any] | None = None,
    ) -> Event:
        """Give it another percent."""
        ...

    def withdraw(
        self, model: str, version: int, *, actor: str | None = None, reason: str, details: Mapping[str, Any] | None = None
    ) -> Event:
        """Take it back."""
        ...


class Canary:
    """See the module.

    Each process judges by the answers that it gave itself since a step began.

    Args:
        lane: follows the log's canary.
        moves: the registry, opened when it is needed.
        policy: steps and guardrails.
        poll_seconds: between two looks into the log and at the figures.
        clock: the present, UTC.

    Attributes:
        verdict: the last one; None while there is no canary.
    """

    def __init__(
        self,
        lane: Lane,
        moves: Callable[[], Moves],
        policy: CanaryPolicy,
        poll_seconds: float = 1.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.lane, self.policy = lane, policy
        self.verdict: Verdict | None = None
        self._moves, self._clock = moves, clock
        self._step: tuple[int, tuple[int, str] | None] | None = None
        self._own, self._champion, self._shown = Figures(), Figures(), Shown()
        self._champion_key: tuple[int, str] | None = None
        self._thread = Repeating(self.look, poll_seconds, "canary")

    def start(self) -> None:
        """Begin to follow the log."""
        self._thread.start()

    def stop(self) -> None:
        """End; does not wait."""
        self._thread.stop()

    def renew(self) -> None:
        """See `Lane.renew`."""
        self.lane.renew()

    def choose(self, user_id: str, champion: Loaded) -> Loaded:
        """The bundle that answers a user."""
        now = self.lane.now
        return now[1] if now is not None and is_in(user_id, now[0]) else champion

    @property
    def canary(self) -> Loaded | None:
        """The bundle of the lane; None while there is none."""
        now = self.lane.now
        return None if now is None else now[1]

    def ended(self, request_id: str, loaded: Loaded, seconds: float, outcome: Answer | Rejected) -> None:
        """A request that a bundle was to answer has ended."""
        now = self.lane.now
        if now is None:
            return
        if loaded.key == now[1].key:
            figures = self._own
        else:
            figures, self._champion_key = self._champion, loaded.key
        if isinstance(outcome, Rejected):
            figures.answered(seconds, error=outcome.status >= _SERVER_ERROR)
            return
        self._shown.keep(request_id, outcome)
        items, flags = outcome.response.items, outcome.response.flags
        probability = items[0].probability if items and not math.isnan(items[0].probability) else None
        figures.answered(seconds, error=RETRIEVER_ONLY in flags or POPULAR in flags, probability=probability)

    def feedback(self, request_id: str, user_id: str, item_id: str, values: Mapping[str, Any]) -> None:
        """An event about an item of a list that was answered lately: a label, by which the calibration is judged; see `Shown.labelled`."""
        now = self.lane.now
        if now is None or (found := self._shown.labelled(request_id, user_id, item_id, values)) is None:
            return
        if found.key == now[1].key:
            self._own.label(found.probability, found.label)
        elif found.key == self._champion_key:
            self._champion.label(found.probability, found.label)

    def look(self) -> None:
        """Follow the log, judge by the figures, and move the canary where the policy says so."""
        self.lane.follow()
        now = self.lane.now
        if now is None:
            if self._step is not None:
                self.verdict, self._step, self._shown = None, None, Shown()
            return
        event = now[0]
        if self._step != (step := (event.id, self._champion_key)):
            # Another step, or another champion: what was counted before says nothing of this one.
            self._step, self._own, self._champion = step, Figures(), Figures()
        minutes = (self._clock() - event.time).total_seconds() / 60
        self.verdict = self.policy.verdict(float(event.details["percent"]), minutes, self._own, self._champion)
        if self.verdict.move in ("withdraw", "advance"):
            self._move(event, self.verdict)

    def _move(self, event: Event, verdict: Verdict) -> None:
        details: dict[str, Any] = {"figures": verdict.figures}
        try:
            if verdict.move == "withdraw":
                reason = "; ".join(verdict.problems)
                self._moves().withdraw(event.model, event.to_version, actor=ACTOR, reason=reason, details=details)
                log.warning("canary %d withdrawn: %s", event.to_version, reason)
            else:
                reason, details = f"all guardrails hold at {event.details['percent']}%", {**details, SALT: salt_of(event)}
                percent = verdict.percent
                self._moves().stage(event.model, event.to_version, "canary", percent=percent, actor=ACTOR, reason=reason, details=details)
        except RegistryError as error:
            log.warning("canary %d not moved: %s", event.to_version, error)
        self.lane.follow()
