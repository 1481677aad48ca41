# SPDX-License-Identifier: Apache-2.0
"""How two opinions become one list, and what business rules leave of it. Pure functions over the candidates of one list."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch

from recsys.bundle.rules import Quota
from recsys.efficiency.selectors import MMR
from recsys.efficiency.view import TokenView

_SMALLEST = 1e-12


def combine(log_probability: np.ndarray, probability: np.ndarray, rank_weight: float) -> np.ndarray:
    """``log P(item | history) + λ · log P(label | item, user)``, elementwise.

    With λ = 1 this is the log-probability that the user takes the item next *and* that the label holds, if both models are calibrated
    and the label is independent of the choice given the features; λ is chosen on the validation period because neither is exactly so.
    """
    return np.asarray(log_probability + rank_weight * np.log(np.maximum(probability, _SMALLEST)))


def top(score: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """The places of the ``k`` best finite scores of one list, best first; equal scores in the order of their catalogue rows."""
    order = np.lexsort((rows, -score))
    best: np.ndarray = order[np.isfinite(score[order])][:k]
    return best


def within_quotas(order: np.ndarray, values: Sequence[Sequence[Sequence[Hashable]]], quotas: Sequence[Quota]) -> np.ndarray:
    """The places of ``order`` that fit, taken one after another. Every part of what comes back is within the quotas, too.

    With one quota over an attribute of one value, no choice is longer. (With several, it may be: the longest is a hard problem, and
    would leave out better items.)

    Args:
        order: int64, places, best first.
        values: for each quota, by place, the values of that item's attribute; none where it is not limited.
        quotas: all of which hold.
    """
    taken: list[Counter[Hashable]] = [Counter() for _ in quotas]
    chosen = []
    for place in order.tolist():
        own = [set(of[place]) for of in values]
        if all(count[value] < quota.most for count, quota, several in zip(taken, quotas, own, strict=True) for value in several):
            chosen.append(place)
            for count, several in zip(taken, own, strict=True):
                count.update(several)
    return np.asarray(chosen, np.int64)


def diverse(order: np.ndarray, score: np.ndarray, vectors: Callable[[np.ndarray], np.ndarray], k: int, diversity: float) -> np.ndarray:
    """Of ``order``, the ``k`` that weigh score against likeness (`MMR` with ``1 - diversity``), still in this order.

    Args:
        order: int64, places, best first.
        score: by place.
        vectors: float32 ``[P, D]`` of places ``[P]``; asked only where there is a choice.
        k: how many are wanted.
        diversity: in [0, 1]; 0 takes the first.
    """
    if diversity == 0 or len(order) <= k:
        return order[:k]
    # The selector prefers the later of two equals, a list the earlier.
    backwards = order[::-1].copy()
    values = torch.from_numpy(np.ascontiguousarray(vectors(backwards), np.float32))
    view = TokenView.of(values, torch.tensor([0, len(backwards)]))
    selector = MMR(MMR.Config(importance=1 - diversity))
    chosen = selector.select(view, torch.from_numpy(score[backwards].astype(np.float32)), torch.tensor([k]))
    return np.asarray(backwards[chosen.index.numpy()][::-1])
