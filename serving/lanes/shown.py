# SPDX-License-Identifier: Apache-2.0
"""What the ranker said of the lists that were answered lately, kept until feedback names them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recsys.data.encode import label_of
from recsys.data.encoding.config import Task
from serving.engine.cache import LRU
from serving.engine.loaded import Loaded
from serving.engine.work import Answer

_LISTS, _ITEMS = 5_000, 50


@dataclass(frozen=True)
class _List:
    key: tuple[int, str]
    task: Task
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Labelled:
    """An item of a list for which a label has come.

    Attributes:
        key: of the bundle that made the list, see `Loaded.key`.
        probability: the ranker's.
        label: what the ranker predicts, as the event has it.
    """

    key: tuple[int, str]
    probability: float
    label: float


class Shown:
    """See the module. The last lists are kept, and of each the first items; each item is labelled once.

    Args:
        lists: how many are kept.
        items: of each list.
    """

    def __init__(self, lists: int = _LISTS, items: int = _ITEMS) -> None:
        self._items = items
        self._lists: LRU[tuple[str, str], _List] = LRU(lists)

    def keep(self, request_id: str, answer: Answer) -> None:
        """Keep a list, if the ranker made it."""
        loaded, items = answer.loaded, answer.response.items[: self._items]
        probabilities = {item.item_id: item.probability for item in items if not math.isnan(item.probability)}
        if probabilities:
            self._lists.put((request_id, answer.response.user_id), _List(loaded.key, _task(loaded), probabilities))

    def labelled(self, request_id: str, user_id: str, item_id: str, values: Mapping[str, Any]) -> Labelled | None:
        """What an event of a user about an item of a list says of it.

        None where the list is not kept or was another user's, does not hold the item or has its label already, or where the event's values
        lack the column of what the ranker predicts.
        """
        kept = self._lists.get((request_id, user_id))
        if kept is None or item_id not in kept.probabilities or (label := label_of(kept.task, values)) is None:
            return None
        probability = kept.probabilities.pop(item_id, None)
        return None if probability is None else Labelled(kept.key, probability, label)


def _task(loaded: Loaded) -> Task:
    bundle = loaded.recommender.bundle
    return next(task for task in bundle.encoder.config.tasks if task.name == bundle.settings.task)
