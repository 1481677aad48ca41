# SPDX-License-Identifier: Apache-2.0
"""What a user took last, again: the row without which no figure on data with repeats means anything."""

from typing import Literal, Self

import numpy as np

from recsys.core.config import Config as BaseConfig
from recsys.data.batch import SequenceBatch
from recsys.data.sequences import SequenceData


class RepeatLast:
    """The items of the history, the most recent one first; all others share the score 0.

    On RecGPT's published test split of Steam this has a hit rate of .1245 in the first place, where the model has .1237
    (papers/retrieval.md, §2).
    """

    class Config(BaseConfig):
        """Nothing to choose."""

        name: Literal["repeat_last"] = "repeat_last"

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, data: SequenceData, count: int) -> Self:
        """Take note of the catalogue's size."""
        self._count = count
        return self

    def scores(self, histories: SequenceBatch) -> np.ndarray:
        """float32 ``[B, N]``: an item's last place in the history, counted from 1; 0 for items that are not in it."""
        scores = np.zeros((len(histories), self._count), np.float32)
        items, offsets = histories.items.numpy(), histories.offsets.numpy()
        lengths = np.diff(offsets)
        row = np.repeat(np.arange(len(histories)), lengths)
        place = np.arange(len(items)) - np.repeat(offsets[:-1], lengths) + 1
        np.maximum.at(scores, (row, items), place.astype(np.float32))
        return scores
