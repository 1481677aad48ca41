# SPDX-License-Identifier: Apache-2.0
"""The served list, measured through the one recommendation path; and whether its explanations are true."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from feature_store.offline import OfflineReader
from pipelines.steps.features import Offline
from pipelines.steps.prepared import Prepared
from recsys.data.sequences import EvaluationSteps
from recsys.evaluation.metrics.ranking import ndcg_at
from recsys.inference import rules
from recsys.inference.explain import erasure_effects
from recsys.inference.frame import ITEM_SERVICE
from recsys.inference.recommender import Candidates, Recommender, Users
from recsys.training.progress import track

_CHUNK = 128
_SHORTEST = 3  # events: with fewer, the top, a random and the last event hardly differ


@dataclass(frozen=True)
class Retrieved:
    """What the path finds for S steps before the two opinions are combined.

    Attributes:
        candidates: rows and the retriever's log-probabilities, ``[S, C]``.
        probability: the ranker's, ``[S, C]``.
    """

    candidates: Candidates
    probability: np.ndarray


def retrieve(recommender: Recommender, steps: EvaluationSteps, description: str) -> Retrieved:
    """Run users → retrieve → rank for every step, as of just before it."""
    count = recommender.bundle.settings.candidates
    rows, scores, probabilities = [], [], []
    for start in track(range(0, len(steps), _CHUNK), description):
        users = recommender.users(steps.user_id[start : start + _CHUNK], steps.request_time[start : start + _CHUNK])
        ranked = recommender.rank(users, recommender.retrieve(users, count))
        rows.append(ranked.candidates.rows)
        scores.append(ranked.candidates.log_probability)
        probabilities.append(ranked.probability)
    return Retrieved(Candidates(np.concatenate(rows), np.concatenate(scores)), np.concatenate(probabilities))


def list_ranks(retrieved: Retrieved, steps: EvaluationSteps, rank_weight: float) -> np.ndarray:
    """The place of every target in its step's list, 1 is first, infinity where it is not in the list: float64 ``[targets]``."""
    rows = retrieved.candidates.rows
    score = rules.combine(retrieved.candidates.log_probability, retrieved.probability, rank_weight)
    score = np.where(rows >= 0, score, -np.inf)
    order = np.lexsort((rows, -score), axis=1)
    listed = np.take_along_axis(rows, order, axis=1)
    step_of_target = np.repeat(np.arange(len(steps)), np.diff(steps.targets.offsets))
    hits = listed[step_of_target] == steps.targets.values[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1.0, np.inf)


def choose_rank_weight(retrieved: Retrieved, steps: EvaluationSteps, weights: tuple[float, ...]) -> float:
    """The λ with the best NDCG@10; of equals, the first."""
    return max(weights, key=lambda weight: float(ndcg_at(list_ranks(retrieved, steps, weight), 10).mean()))


@dataclass(frozen=True)
class Deletions:
    """By how much the score of a served item falls when one event of the history is removed: float64 ``[requests]`` for each choice.

    Attributes:
        user: the user of each request, as a number; intervals are taken over users.
        top: the event that the explanation names first.
        random: one drawn by seed.
        last: the newest.
    """

    user: np.ndarray
    top: np.ndarray
    random: np.ndarray
    last: np.ndarray


def deletion_test(
    recommender: Recommender, prepared: Prepared, store: Offline, steps: EvaluationSteps, requests: int, seed: int
) -> Deletions:
    """Remove the top-attributed, a random and the last event for the first item of as many requests, and score it again.

    First the last request of every user that has events enough, then further ones of the same users.

    The event is removed from the user's raw events, so that every feature of the user is computed anew without it, while the
    attribution only erased it from the history's lists.
    """
    random = np.random.default_rng(seed)
    effects: dict[str, list[float]] = {"top": [], "random": [], "last": []}
    users: np.ndarray = steps.user_id.dictionary_encode().indices.to_numpy()
    places = _explained(users, steps, requests, random)
    for place in track(places, "explanations"):
        user, at = steps.user_id[place : place + 1], steps.request_time[place : place + 1]
        asked = recommender.users(user, at)
        length = int(asked.history.offsets[1])
        ranked = recommender.rank(asked, recommender.retrieve(asked, recommender.bundle.settings.candidates))
        best = ranked.candidates.rows[:, [int(np.argmax(ranked.score[0]))]]
        attributed = erasure_effects(recommender, asked, 0, best[0])[:, 0]
        events = prepared.events_of(user[0].as_py(), at[0].as_py())
        for name, event in (("top", int(np.argmax(attributed))), ("random", int(random.integers(length))), ("last", length - 1)):
            kept = np.delete(np.arange(events.num_rows), events.num_rows - length + event)
            edited = Recommender(recommender.bundle, _Edited(store, events.take(pa.array(kept))))
            effects[name].append(float(ranked.score.max()) - _score(edited, edited.users(user, at), best))
    return Deletions(user=users[places], **{name: np.array(values) for name, values in effects.items()})


class _Edited:
    """A feature reader that knows other events of the users, and the same of the items."""

    def __init__(self, store: Offline, events: pa.Table) -> None:
        self._items = store.reader
        self._users = OfflineReader(store.features, store.tables | {"interactions": events})

    def read(self, service: str, spine: pa.Table) -> pa.Table:
        return (self._items if service == ITEM_SERVICE else self._users).read(service, spine)


def _score(recommender: Recommender, users: Users, rows: np.ndarray) -> float:
    return float(recommender.rank(users, recommender.score(users, rows)).score[0, 0])


def _explained(users: np.ndarray, steps: EvaluationSteps, count: int, random: np.random.Generator) -> list[int]:
    """Up to ``count`` steps with at least `_SHORTEST` earlier events: the last of each user first, then others, drawn by seed."""
    places = random.permutation(np.flatnonzero(steps.event - steps.start >= _SHORTEST))
    newest_first = places[np.argsort(-places, kind="stable")]
    _, first = np.unique(users[newest_first], return_index=True)
    last = newest_first[first]
    others = places[~np.isin(places, last)]
    return sorted(np.concatenate([random.permutation(last), others])[:count].tolist())
