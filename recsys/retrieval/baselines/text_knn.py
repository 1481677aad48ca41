# SPDX-License-Identifier: Apache-2.0
"""Items whose texts are like those of the history: what frozen text embeddings say by themselves, of new items too."""

from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field
from scipy import sparse

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import DataError
from recsys.data.batch import SequenceBatch
from recsys.data.sequences import SequenceData

Pooling = Literal["mean", "max"]

_COSINES_AT_ONCE = 1 << 22


class TextKNN:
    """Cosine of text embeddings between every item and the events of the history, recency-weighted; nothing is learnt.

    ``mean``: ``score(i) = Σ_h w_h cos(h, i) / Σ_h w_h``, and ``max``: ``score(i) = max_h w_h cos(h, i)``, with ``w_h = decay^age(h)`` over
    the events h of the history that have a text, where the newest event has age 0. An item without text (its vector is all zero) has the
    score -inf, whatever the history.

    Args:
        config: see `Config`.
        text: float ``[N, D]``, the text embeddings of all catalogue rows, of whatever length; a row of zeros for an item without text.
    """

    class Config(BaseConfig):
        """Configuration.

        Attributes:
            pooling: over the history. The mean costs ``B N D``, the maximum ``L`` times as much for histories of L events.
            decay: the weight of an event against that of the next newer one; 1 weighs all alike.
        """

        name: Literal["text_knn"] = "text_knn"
        pooling: Pooling = "mean"
        decay: float = Field(1.0, gt=0, le=1)

    def __init__(self, config: Config, text: np.ndarray | torch.Tensor) -> None:
        self.config = config
        self._text = np.asarray(text, np.float32)

    def fit(self, data: SequenceData, count: int) -> Self:
        """Bring the embeddings to unit length; the events are not looked at.

        Raises:
            DataError: there is not one finite embedding for each of ``count`` catalogue rows.
        """
        if self._text.ndim != 2 or len(self._text) != count:
            raise DataError(f"text_knn: text: expected shape [{count}, D], one row for each item, got {list(self._text.shape)}")
        finite = np.isfinite(self._text).all(axis=1)
        if not finite.all():
            raise DataError(f"text_knn: text: row {int(np.argmin(finite))} is not finite")
        norms = np.linalg.norm(self._text, axis=1, keepdims=True)
        self._told = norms[:, 0] > 0
        self._unit = np.divide(self._text, norms, out=np.zeros_like(self._text), where=norms > 0)
        return self

    def scores(self, histories: SequenceBatch) -> np.ndarray:
        """float32 ``[B, N]``: for items with a text, 0 after a history that has none."""
        items, offsets = histories.items.numpy(), histories.offsets.numpy()
        age = np.repeat(offsets[1:], np.diff(offsets)) - 1 - np.arange(len(items))
        weights = np.power(self.config.decay, age).astype(np.float32)
        told = self._told[items]
        offsets = np.append(0, np.cumsum(told))[offsets]
        pool = self._mean if self.config.pooling == "mean" else self._max
        scores = pool(sparse.csr_array((weights[told], items[told], offsets), shape=(len(histories), len(self._unit))))
        scores[:, ~self._told] = -np.inf
        return scores

    def _mean(self, weights: sparse.csr_array) -> np.ndarray:
        """One product of the histories' mean vectors ``[B, D]`` and the items' ``[N, D]``."""
        sums = weights.sum(axis=1)
        means = weights @ self._unit / np.where(sums > 0, sums, 1)[:, None]
        scores: np.ndarray = means @ self._unit.T
        return scores

    def _max(self, weights: sparse.csr_array) -> np.ndarray:
        """Some histories at a time, so that few events' cosines with all items are held."""
        scores = np.zeros(weights.shape, np.float32)
        told, starts = np.flatnonzero(np.diff(weights.indptr)), weights.indptr
        part = starts[told] // max(1, _COSINES_AT_ONCE // max(1, len(self._unit)))
        for rows in filter(len, np.split(told, np.flatnonzero(np.diff(part)) + 1)):
            own = slice(starts[rows[0]], starts[rows[-1] + 1])
            events = weights.data[own, None] * self._unit[weights.indices[own]]
            scores[rows] = np.maximum.reduceat(events @ self._unit.T, starts[rows] - own.start, axis=0)
        return scores
