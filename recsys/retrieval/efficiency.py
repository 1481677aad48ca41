# SPDX-License-Identifier: Apache-2.0
"""What a retriever can be told to save: the recipe's key ``efficiency`` of a retriever."""

from torch import Tensor

from recsys.core.config import Config as BaseConfig
from recsys.data.batch import SequenceBatch
from recsys.efficiency.history import HistoryPruning
from recsys.efficiency.view import TokenView


class RetrieverEfficiency(BaseConfig):
    """How a retriever spends less; every part is optional.

    Attributes:
        history: which events of a history the model reads when it is asked for a state. Training reads its windows whole.
    """

    history: HistoryPruning.Config | None = None


def pruned_history(pruning: HistoryPruning, batch: SequenceBatch, vectors: Tensor) -> SequenceBatch:
    """The histories that a model reads, from those that a user has; ``vectors`` float ``[S, d]`` stand for the events."""
    view = TokenView.of(vectors, batch.offsets, ids=batch.items)
    kept = pruning(view)
    return SequenceBatch(kept.gather(batch.items), kept.offsets)
