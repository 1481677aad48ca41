# SPDX-License-Identifier: Apache-2.0
"""The lists of a hurry: of the retriever alone, or the popular one. Cheap enough for the reserve of a deadline, and free of I/O.

Why something was left out is told in few texts: ``deadline``, where the time was over before a stage; or a stage (``features``, ``items``,
``retrieve``, ``rank``, ``explain``) and what was wrong with it, as ``features: left alone`` (the store), ``too slow`` or ``failed``.
"""

from dataclasses import replace

import numpy as np

from recsys.inference import rules
from recsys.inference.request import Response, Scored
from serving.engine.entry import Entry
from serving.engine.work import CACHED_FEATURES, NO_REASONS, POPULAR, RETRIEVER_ONLY, Answer

UNKNOWN = float("nan")
"""The ranker's probability where no ranker was asked."""
DEADLINE = "deadline"


def best_known(entry: Entry, why: str) -> Answer:
    """The best answer that what is known so far allows, at once; it says why it is no better."""
    if entry.known.answer is not None:
        return flagged(because(entry.known.answer, why), NO_REASONS)
    if entry.known.candidates is not None:
        return because(retriever_only(entry), why)
    return because(popular(entry), why)


def retriever_only(entry: Entry) -> Answer:
    """The candidates in the retriever's order."""
    assert entry.known.candidates is not None
    rows, log_probability = entry.known.candidates
    live = (rows >= 0) & np.isfinite(log_probability)
    order = entry.loaded.recommender.choose(entry.work.request, np.where(live, log_probability, -np.inf), rows)
    return _answer(entry, rows[order], log_probability[order], RETRIEVER_ONLY)


def popular(entry: Entry) -> Answer:
    """The given items, or the live items that the user is not known to have seen, in the order of their popularity."""
    popularity, view = entry.loaded.popular, entry.loaded.recommender.view
    if entry.item_rows is None:
        rows = popularity.top(entry.rows, view.live, entry.known.seen)
        rows = rows[entry.loaded.recommender.choose(entry.work.request, popularity.log_share[rows], rows)]
    else:
        rows = entry.item_rows
        rows = rows[rules.top(popularity.log_share[rows], rows, entry.work.request.k)]
    return _answer(entry, rows, popularity.log_share[rows], POPULAR)


def because(answer: Answer, why: str) -> Answer:
    """The same answer, which lacks something for one more reason."""
    return replace(answer, why=(*answer.why, why))


def flagged(answer: Answer, *flags: str) -> Answer:
    """The same answer with further flags."""
    added = tuple(flag for flag in flags if flag not in answer.response.flags)
    return replace(answer, response=replace(answer.response, flags=(*answer.response.flags, *added)))


def _answer(entry: Entry, rows: np.ndarray, log_probability: np.ndarray, rung: str) -> Answer:
    request, loaded, known = entry.work.request, entry.loaded, entry.known
    ids = loaded.recommender.view.take(rows).to_pylist()
    items = tuple(Scored(item, float(value), float(value), UNKNOWN) for item, value in zip(ids, log_probability, strict=True))
    flags = [
        *(["new_user"] if known.new_user else []),
        *(["short_list"] if len(items) < request.k else []),
        *([CACHED_FEATURES] if known.ages.cached is not None and rung != POPULAR else []),
        rung,
        *([NO_REASONS] if request.explain else []),
    ]
    return Answer(Response(request.user_id, items, loaded.sha256, tuple(flags)), loaded, known.stages, known.ages, known.why)
