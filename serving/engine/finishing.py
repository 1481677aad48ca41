# SPDX-License-Identifier: Apache-2.0
"""Where every answer leaves the engine: resolved once, counted, and handed to the hook."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np

from recsys.inference.recommender import Candidates, Ranked, Users
from serving.engine import ladder
from serving.engine.candidates import take_users
from serving.engine.entry import Entry
from serving.engine.hook import Hook
from serving.engine.ladder import flagged
from serving.engine.loaded import Loaded
from serving.engine.work import Answer, Served
from serving.metrics import Metrics
from serving.tracing import exemplar_of


@dataclass(frozen=True)
class Trace:
    """What one request's list was made of; see `Served`."""

    users: Users
    ranked: Ranked


class Finisher:
    """Resolves entries.

    Args:
        metrics: counts answers.
        hook: is told of them, if there is one.
        present: the bundle that answers now, by whose catalogue the answers of others are judged.
    """

    def __init__(self, metrics: Metrics, hook: Hook | None, present: Callable[[], Loaded | None] = lambda: None) -> None:
        self._metrics, self._hook, self._present = metrics, hook, present

    def trace(self, entry: Entry, users: Users, ranked: Ranked, b: int) -> Trace | None:
        """What the list of request ``b`` of a batch is made of; None where nobody is told."""
        if self._hook is None:
            return None
        rows, one, width = ranked.candidates.rows, slice(b, b + 1), entry.rows
        before, own = int(np.count_nonzero(rows[:b] >= 0)), int(np.count_nonzero(rows[b] >= 0))
        candidates = Candidates(rows[one, :width], ranked.candidates.log_probability[one, :width])
        items = ranked.items.slice(before, own)
        alone = Ranked(candidates, items, ranked.probability[one, :width], ranked.score[one, :width])
        return Trace(take_users(entry.loaded.recommender, users, [b]), alone)

    def answer(self, entry: Entry, answer: Answer, trace: Trace | None = None) -> None:
        """Answer a request, unless it has been answered."""
        if entry.claim():
            answer = self.answered(entry, answer, trace)
            entry.settle(answer)

    def fall_back(self, entry: Entry, why: str) -> None:
        """Answer a request with the best list that is known so far, unless it has been answered; why, as `serving.engine.ladder` has it."""
        if not entry.gone:
            self.answer(entry, ladder.best_known(entry, why))

    def answered(self, entry: Entry, answer: Answer, trace: Trace | None = None) -> Answer:
        """What is answered: without what may not be shown any more. Counts it, and tells the hook of it."""
        answer = self._still_live(entry, answer)
        exemplar = exemplar_of(entry.span)
        self._metrics.answered(answer.stages, answer.response.flags, answer.ages.cached, answer.ages.newest_event, exemplar)
        if answer.response.items and not math.isnan(answer.response.items[0].probability):
            self._metrics.probability.observe(answer.response.items[0].probability)
        if self._hook is not None:
            self._hook.offer(_served(entry, answer, trace))
        return answer

    def _still_live(self, entry: Entry, answer: Answer) -> Answer:
        """Of a list that was begun before the catalogue changed, what may be shown now. Items that the caller gave are not judged."""
        present, response = self._present(), answer.response
        if present is None or present is answer.loaded or entry.item_rows is not None:
            return answer
        view = present.recommender.view
        rows = view.rows([item.item_id for item in response.items])
        kept = tuple(item for item, row in zip(response.items, rows, strict=True) if row < 0 or view.live[row])
        if len(kept) == len(response.items):
            return answer
        return flagged(replace(answer, response=replace(response, items=kept)), "short_list")


def _served(entry: Entry, answer: Answer, trace: Trace | None) -> Served:
    return Served(
        request_id=entry.work.request_id,
        time=datetime.now(UTC),
        request=entry.work.request,
        deadline=entry.work.deadline,
        loaded=answer.loaded,
        users=None if trace is None else trace.users,
        ranked=None if trace is None else trace.ranked,
        response=answer.response,
        flags=answer.response.flags,
        stages=answer.stages,
        given=entry.item_rows is not None,
    )
