# SPDX-License-Identifier: Apache-2.0
"""Item-based top-N recommendation by cosine (Deshpande and Karypis, "Item-based top-N recommendation algorithms", TOIS 2004).

Each item keeps the items most like it; each item of a user's history votes for its own neighbours (their algorithm ApplyModel).
Beyond the paper: shrinkage of similarities that rest on few users, and votes that fade with the age of the event.
"""

from typing import Self

import numpy as np
from pydantic import Field
from scipy import sparse

from recsys.core.config import Config as BaseConfig
from recsys.data.batch import SequenceBatch
from recsys.data.sequences import SequenceData

_ROWS_AT_ONCE = 2048


class ItemKNN:
    """Item-item cosine over users, k nearest neighbours, recency-weighted votes.

    ``score(i) = Σ_h decay^age(h) · sim(h, i)`` over the events h of the history, where the newest event has age 0, and i is among the
    neighbours of h. ``sim(h, i) = |U_h ∩ U_i| / (sqrt(|U_h| |U_i|) + shrinkage)``, U_i being the users with an event of item i.
    """

    class Config(BaseConfig):
        """Configuration.

        Attributes:
            neighbours: how many neighbours each item keeps; ties go to the smaller row.
            shrinkage: added to the denominator of the cosine.
            decay: the weight of an event against that of the next newer one; 1 weighs all alike.
        """

        neighbours: int = Field(100, ge=1)
        shrinkage: float = Field(0.0, ge=0)
        decay: float = Field(1.0, gt=0, le=1)

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, data: SequenceData, count: int) -> Self:
        """Compute the neighbours of each of ``count`` catalogue rows; memory is 2,048 rows of similarities at once."""
        users = np.repeat(np.arange(len(data.offsets) - 1), np.diff(data.offsets))
        by_user = sparse.csr_array((np.ones(len(users), np.float32), (users, data.items)), shape=(len(data.offsets) - 1, count))
        by_user.data[:] = 1  # a repeated event counts once
        by_item = by_user.T.tocsr()
        norms = np.sqrt(np.diff(by_item.indptr))
        kept = [self._neighbours(by_item, by_user, norms, start) for start in range(0, count, _ROWS_AT_ONCE)]
        self.similarity = sparse.vstack(kept, format="csr") if kept else sparse.csr_array((0, 0), dtype=np.float32)
        return self

    def scores(self, histories: SequenceBatch) -> np.ndarray:
        """float32 ``[B, N]``: the votes of each history; 0 for all items after an empty one."""
        items, offsets = histories.items.numpy(), histories.offsets.numpy()
        age = np.repeat(offsets[1:], np.diff(offsets)) - 1 - np.arange(len(items))
        weights = np.power(self.config.decay, age).astype(np.float32)
        votes = sparse.csr_array((weights, items, offsets), shape=(len(histories), self.similarity.shape[0]))
        scores: np.ndarray = (votes @ self.similarity).toarray()
        return scores

    def _neighbours(self, by_item: sparse.csr_array, by_user: sparse.csr_array, norms: np.ndarray, start: int) -> sparse.csr_array:
        """The rows of the similarity from ``start`` on: each with its ``neighbours`` largest entries, itself not among them."""
        together = (by_item[start : start + _ROWS_AT_ONCE] @ by_user).tocoo()
        row, column = together.coords
        other = row + start != column
        row, column = row[other], column[other]
        cosine = together.data[other] / (norms[row + start] * norms[column] + self.config.shrinkage)
        order = np.lexsort((column, -cosine, row))
        first = np.searchsorted(row[order], np.arange(together.shape[0]))
        rank = np.arange(len(order)) - first[row[order]]
        kept = order[rank < self.config.neighbours]
        return sparse.csr_array((cosine[kept].astype(np.float32), (row[kept], column[kept])), shape=together.shape)
