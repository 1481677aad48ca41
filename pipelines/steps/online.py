# SPDX-License-Identifier: Apache-2.0
"""The served path beside the offline one: whether their scores agree, and how long a recommendation takes."""

import time

import numpy as np
import pyarrow as pa

from recsys.data.sequences import EvaluationSteps
from recsys.inference.recommender import Recommender
from recsys.inference.request import Request

_PARITY_REQUESTS = 50
_LATENCY_REQUESTS = 100
_EXPLAINED_REQUESTS = 20


def parity(offline: Recommender, online: Recommender, steps: EvaluationSteps, seed: int) -> float:
    """The greatest difference between the scores of offline and online features, over some steps of the test period."""
    chosen = np.random.default_rng(seed).permutation(len(steps))[:_PARITY_REQUESTS]
    users, at = steps.user_id.take(pa.array(chosen)), steps.request_time.take(pa.array(chosen))
    first = offline.users(users, at)
    retrieved = offline.retrieve(first, offline.bundle.settings.candidates)
    one = offline.rank(first, retrieved)
    second = online.users(users, at)
    two = online.rank(second, online.score(second, retrieved.rows))
    present = retrieved.rows >= 0
    return float(np.abs(one.score[present] - two.score[present]).max())


def latency(online: Recommender, steps: EvaluationSteps, k: int, seed: int) -> dict[str, float]:
    """Milliseconds of a recommendation, one at a time, in this process: median and 99th percentile; and the median with explanations."""
    chosen = np.random.default_rng(seed).permutation(len(steps))
    plain = _taken(online, steps, chosen[:_LATENCY_REQUESTS], k, explain=False)
    explained = _taken(online, steps, chosen[:_EXPLAINED_REQUESTS], k, explain=True)
    return {"p50_ms": float(np.median(plain)), "p99_ms": float(np.quantile(plain, 0.99)), "explained_p50_ms": float(np.median(explained))}


def _taken(online: Recommender, steps: EvaluationSteps, places: np.ndarray, k: int, *, explain: bool) -> list[float]:
    taken = []
    for place in places:
        request = Request(user_id=steps.user_id[place].as_py(), k=k, at=steps.request_time[place].as_py(), explain=explain)
        started = time.perf_counter()
        online.recommend([request])
        taken.append(1000 * (time.perf_counter() - started))
    return taken
