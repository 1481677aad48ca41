# SPDX-License-Identifier: Apache-2.0
"""What a retriever must beat: plain counts, what was taken last, and neighbours in the co-occurrence of items and in their texts."""

from typing import Protocol, Self

import numpy as np

from recsys.data.batch import SequenceBatch
from recsys.data.sequences import SequenceData
from recsys.retrieval.baselines.item_knn import ItemKNN
from recsys.retrieval.baselines.popularity import Popularity
from recsys.retrieval.baselines.repeat_last import RepeatLast
from recsys.retrieval.baselines.text_knn import TextKNN

__all__ = ["Baseline", "ItemKNN", "Popularity", "RepeatLast", "TextKNN"]


class Baseline(Protocol):
    """A recommender without gradients."""

    def fit(self, data: SequenceData, count: int) -> Self:
        """Learn from the events of the training period, over a catalogue of ``count`` items."""
        ...

    def scores(self, histories: SequenceBatch) -> np.ndarray:
        """float32 ``[B, N]``: the score of every catalogue row after each history, seen items included.

        B rows of the whole catalogue are held at once: ask in chunks, such as `recsys.data.sequences.histories` yields.
        """
        ...
