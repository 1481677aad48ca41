# SPDX-License-Identifier: Apache-2.0
"""The last rung: a list for everybody, prepared when a bundle is loaded, that needs no model and no store."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from feature_store.definitions import FeatureRepo
from feature_store.features import Count
from recsys.core.schema import TIME
from recsys.inference import frame
from recsys.inference.recommender import Recommender

_ITEMS_AT_ONCE = 2000


class Popular:
    """The items of a catalogue by how popular they were when the bundle was loaded.

    Args:
        weight: float ``[N]``, by catalogue row, not negative.
    """

    def __init__(self, weight: np.ndarray) -> None:
        self._weight = np.asarray(weight, np.float64)
        smoothed = self._weight + 1.0
        self.log_share = np.log(smoothed / smoothed.sum()).astype(np.float32)
        self._order = np.argsort(-self.log_share, kind="stable")

    @classmethod
    def of(cls, recommender: Recommender, repo: FeatureRepo) -> "Popular":
        """By the first feature of items that counts all their events.

        Without such a feature, by what the retriever finds most probable for a user without a history.
        """
        counts = [
            feature.name
            for name in repo.service(frame.ITEM_SERVICE).views
            for feature in repo.view(name).features
            if isinstance(feature, Count) and feature.window is None and not feature.where
        ]
        return cls(_counted(recommender, counts[0]) if counts else _expected(recommender))

    def extended(self, count: int) -> "Popular":
        """For a catalogue of ``count`` rows: those that it got since have no events yet."""
        new = count - len(self._weight)
        return self if new == 0 else Popular(np.concatenate((self._weight, np.zeros(new))))

    def top(self, k: int, live: np.ndarray, seen: np.ndarray | None) -> np.ndarray:
        """int64, at most ``[k]``: the most popular live rows without those that were seen. ``live`` is bool ``[N]``."""
        seen = np.empty(0, np.int64) if seen is None else np.unique(seen)
        found = np.empty(0, np.int64)
        taken = k + len(seen)
        while True:
            rows = self._order[:taken]
            found = rows[live[rows] & ~np.isin(rows, seen)]
            if len(found) >= k or taken >= len(self._order):
                return found[:k]
            taken *= 2


def _counted(recommender: Recommender, feature: str) -> np.ndarray:
    """float ``[N]``: a feature of every item, 0 where it has no value."""
    now, view = datetime.now(UTC), recommender.view
    weight = np.zeros(view.count)
    for start in range(0, view.count, _ITEMS_AT_ONCE):
        ids = view.ids[start : start + _ITEMS_AT_ONCE]
        read = frame.read_items(recommender.features, ids, pa.array([now] * len(ids), TIME))
        weight[start : start + len(ids)] = read.column(feature).fill_null(0).to_numpy()
    return weight


def _expected(recommender: Recommender) -> np.ndarray:
    """float ``[N]``: the retriever's probability of every item, for nobody in particular."""
    nobody = recommender.users([""], pa.array([datetime.now(UTC)], TIME))
    weight = np.zeros(recommender.view.count)
    for start in range(0, len(weight), _ITEMS_AT_ONCE):
        rows = np.arange(start, min(start + _ITEMS_AT_ONCE, len(weight)))
        weight[rows] = np.exp(recommender.score(nobody, rows[None, :]).log_probability[0])
    return np.where(recommender.scorable, weight, 0.0) * len(weight)
