# SPDX-License-Identifier: Apache-2.0
"""Baselines with the settings that the validation period prefers, since one with settings of chance is easily beaten."""

from collections.abc import Callable, Iterable
from itertools import product
from typing import TypeAlias, TypeVar, get_args

import numpy as np
from torch import Tensor

from recsys.data.sequences import SequenceData
from recsys.evaluation.retrieval import Scorer
from recsys.retrieval.baselines import Baseline, ItemKNN, TextKNN
from recsys.retrieval.baselines.text_knn import Pooling

Quality: TypeAlias = Callable[[Scorer], float]
"""How well scores of all items do on the validation period; higher is better."""

Model = TypeVar("Model", bound=Baseline)

DECAYS = (1.0, 0.9, 0.8, 0.7, 0.6)  # how much less an older event of the history counts


def tuned_item_knn(data: SequenceData, count: int, quality: Quality) -> ItemKNN:
    """Item-kNN over all neighbours, with the decay that does best.

    Args:
        data: the events of the training period.
        count: N, items of the catalogue.
        quality: on the validation period.
    """
    return tuned((ItemKNN(ItemKNN.Config(neighbours=count, decay=decay)).fit(data, count) for decay in DECAYS), quality)


def tuned_text_knn(data: SequenceData, text: np.ndarray | Tensor, quality: Quality) -> TextKNN:
    """Text-kNN, with the pooling and the decay that do best.

    Args:
        data: the events of the training period.
        text: float ``[N, D]``, the text embeddings of all items.
        quality: on the validation period.
    """
    configs = (TextKNN.Config(pooling=pooling, decay=decay) for pooling, decay in product(get_args(Pooling), DECAYS))
    return tuned((TextKNN(config, text).fit(data, len(text)) for config in configs), quality)


def tuned(candidates: Iterable[Model], quality: Quality) -> Model:
    """The fitted candidate that does best, the earlier one of equals; the best so far and the present one alone are held."""
    return max(candidates, key=lambda candidate: quality(candidate.scores))
