# SPDX-License-Identifier: Apache-2.0
"""Before a bundle goes live: every size of batch once, so that no request pays for the first time; and answers that must make sense."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from recsys.core.errors import BundleError
from recsys.core.schema import TIME
from recsys.inference import golden
from recsys.inference.request import Request, Response
from serving.engine.loaded import Loaded

NOBODY = "nobody in particular"
"""A user without a history, whom every bundle must have a list for."""

_K = 10


def warm_up(loaded: Loaded, most_rows: int) -> list[tuple[int, float]]:
    """Answer batches of 1, 2, 4, … requests, up to ``most_rows`` candidates, and explain a list; rows and seconds of each size.

    Each size is answered twice, and the second time counts: the first pays for what is made once.
    """
    request = _ask(loaded.sample[0] if loaded.sample else NOBODY, k=1)
    rows = loaded.recommender.wanted([request])
    largest = max(1, most_rows // rows)
    seen = []
    for size in sorted({*(2**power for power in range(largest.bit_length())), largest}):
        _answer(loaded, request, size)
        began = time.monotonic()
        _answer(loaded, request, size)
        seen.append((size * rows, time.monotonic() - began))
    _answer(loaded, _ask(request.user_id, k=_K, explain=True), 1)
    return seen


def check_answers(loaded: Loaded, users: Sequence[str] = ()) -> None:
    """Answer the requests of which the bundle has recorded answers (`recsys.inference.golden`), and then some others.

    These are of one user without a history, of the bundle's sample, and of further users, such as those that came last.

    Raises:
        BundleError: a recorded request is answered otherwise here; or a list is empty, holds an item that is not live or not finite, or is
            not sorted; says whether the user is a known one, and not who it is, since servers log it.
    """
    golden.check(loaded.recommender)
    for user in dict.fromkeys((NOBODY, *loaded.sample, *users)):
        if problem := _problem(loaded, _answer(loaded, _ask(user, k=_K), 1)):
            whose = "a user without a history" if user == NOBODY else "a user of the store"
            raise BundleError(f"{loaded.name} version {loaded.version}: the list of {whose} {problem}: refused")


def _problem(loaded: Loaded, response: Response) -> str | None:
    view = loaded.recommender.view
    rows = view.rows([item.item_id for item in response.items])
    if not len(rows):
        # A known user may have seen everything; whoever has no history has not.
        return "is empty" if response.user_id == NOBODY else None
    if (rows < 0).any() or not view.live[rows].all():
        return "holds an item that is not live"
    figures = np.array([(item.score, item.log_probability, item.probability) for item in response.items])
    if not np.isfinite(figures).all():
        return "has a score that is not finite"
    if (np.diff(figures[:, 0]) > 0).any():
        return "is not sorted"
    return None


def _ask(user: str, k: int, *, explain: bool = False) -> Request:
    return Request(user_id=user, k=k, at=datetime.now(UTC), explain=explain)


def _answer(loaded: Loaded, request: Request, times: int) -> Response:
    """The answer to a request in a batch that holds it so many times, stage by stage as the engine asks for them."""
    recommender = loaded.recommender
    users = recommender.users([request.user_id] * times, pa.array([request.at] * times, TIME))
    candidates = recommender.retrieve(users, recommender.wanted([request]))
    ranked = recommender.rank(users, candidates, recommender.items(users, candidates))
    return recommender.respond(request, 0, users, ranked)
