# SPDX-License-Identifier: Apache-2.0
"""Where every answer leaves the engine: resolved once, counted, and handed to the hook."""

import math
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from recsys.inference.recommender import Ranked, Users
from serving.engine import ladder
from serving.engine.entry import Entry
from serving.engine.hook import Hook
from serving.engine.work import Answer, Served
from serving.metrics import Metrics


@dataclass(frozen=True)
class Trace:
    """What one request's list was made of; see `Served`."""

    user: pa.Table
    rows: np.ndarray
    log_probability: np.ndarray
    probability: np.ndarray
    score: np.ndarray
    items: pa.Table

    @classmethod
    def of(cls, users: Users, ranked: Ranked, b: int, width: int) -> "Trace":
        """That of request ``b``, which has ``width`` candidates."""
        rows = ranked.candidates.rows
        before = int(np.count_nonzero(rows[:b] >= 0))
        return cls(
            user=users.table.slice(b, 1),
            rows=rows[b, :width],
            log_probability=ranked.candidates.log_probability[b, :width],
            probability=ranked.probability[b, :width],
            score=ranked.score[b, :width],
            items=ranked.items.slice(before, int(np.count_nonzero(rows[b] >= 0))),
        )


class Finisher:
    """Resolves entries.

    Args:
        metrics: counts answers.
        hook: is told of them, if there is one.
    """

    def __init__(self, metrics: Metrics, hook: Hook | None) -> None:
        self._metrics, self._hook = metrics, hook

    def answer(self, entry: Entry, answer: Answer, trace: Trace | None = None) -> None:
        """Answer a request, unless it has been answered."""
        if entry.claim():
            self.answered(entry, answer, trace)
            entry.settle(answer)

    def fall_back(self, entry: Entry) -> None:
        """Answer a request with the best list that is known so far, unless it has been answered."""
        if not entry.gone:
            self.answer(entry, ladder.best_known(entry))

    def answered(self, entry: Entry, answer: Answer, trace: Trace | None = None) -> None:
        """Count an answer, and tell the hook of it."""
        self._metrics.answered(answer.stages, answer.response.flags, answer.ages.cached, answer.ages.newest_event)
        if answer.response.items and not math.isnan(answer.response.items[0].probability):
            self._metrics.probability.observe(answer.response.items[0].probability)
        if self._hook is not None:
            self._hook.offer(_served(entry, answer, trace))


def _served(entry: Entry, answer: Answer, trace: Trace | None) -> Served:
    rows, log_probability = (None, None) if entry.known.candidates is None else entry.known.candidates
    return Served(
        request_id=entry.work.request_id,
        time=datetime.now(UTC),
        request=entry.work.request,
        deadline=entry.work.deadline,
        loaded=answer.loaded,
        user=None if trace is None else trace.user,
        rows=rows if trace is None else trace.rows,
        log_probability=log_probability if trace is None else trace.log_probability,
        probability=None if trace is None else trace.probability,
        score=None if trace is None else trace.score,
        items=None if trace is None else trace.items,
        response=answer.response,
        flags=answer.response.flags,
        stages=answer.stages,
        ranked=entry.item_rows is not None,
    )
