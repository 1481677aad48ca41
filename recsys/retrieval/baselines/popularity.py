# SPDX-License-Identifier: Apache-2.0
"""The same list for everyone: what was taken most often."""

from typing import Self

import numpy as np
from pydantic import Field

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import DataError
from recsys.data.batch import SequenceBatch
from recsys.data.sequences import SequenceData

_DAY = 86_400_000_000  # microseconds


class Popularity:
    """Counts of the training events, or of their last days only."""

    class Config(BaseConfig):
        """Configuration.

        Attributes:
            window_days: count only events less than so many days older than the newest one; None counts all.
        """

        window_days: float | None = Field(None, gt=0)

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, data: SequenceData, count: int) -> Self:
        """Count the events of each of ``count`` catalogue rows.

        Raises:
            DataError: there is no event.
        """
        if not len(data.items):
            raise DataError("popularity: expected at least one training event, got none")
        items = data.items
        if self.config.window_days is not None:
            items = items[data.known_times > data.known_times.max() - self.config.window_days * _DAY]
        self._counts = np.bincount(items, minlength=count).astype(np.float32)
        return self

    def scores(self, histories: SequenceBatch) -> np.ndarray:
        """float32 ``[B, N]``: the counts, whatever the history."""
        return np.tile(self._counts, (len(histories), 1))
