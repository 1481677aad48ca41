# SPDX-License-Identifier: Apache-2.0
"""Train a model over codes on several catalogues at once, and ask it about any."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from recsys.core import components
from recsys.core.config import Config
from recsys.data.domains import Domain, joined
from recsys.data.sequences import EvaluationSteps, SequenceData
from recsys.data.windows import SequenceLoader
from recsys.evaluation.metrics.ranking import ndcg_at, recall_at
from recsys.evaluation.retrieval import model_ranks
from recsys.retrieval.base import CodeRetriever
from recsys.retrieval.catalogue import Catalogue, Index
from recsys.retrieval.items import ItemTable
from recsys.retrieval.items import joined as joined_items
from recsys.training.progress import TrainingProgress
from recsys.training.tracking import Tracker
from recsys.training.trainer import History, Trainer, Training


@dataclass(frozen=True)
class Source:
    """One catalogue of a training.

    Attributes:
        name: its name.
        data: all events.
        train: those that are trained on.
        valid: what validation predicts, among the catalogue's own items; None for nothing.
        items: the catalogue, with text embeddings.
    """

    name: str
    data: SequenceData
    train: SequenceData
    valid: EvaluationSteps | None
    items: ItemTable


class Pretraining:
    """A model over the codes of several catalogues.

    Args:
        sources: what it is trained on.
        model: its configuration.
        index: the configuration of the index by which it is asked.
        code: from a catalogue's items to the same with codes, by one tokenizer for all.
        seed: of everything that is random.
        start: a model to go on from, in the place of a new one.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        model: Config,
        index: Config,
        code: Callable[[ItemTable], ItemTable],
        seed: int,
        start: CodeRetriever | None = None,
    ) -> None:
        self._sources, self._index, self._seed = sources, index, seed
        self._coded = [code(source.items) for source in sources]
        self._whole = joined_items(self._coded)
        torch.manual_seed(seed)
        self.model: CodeRetriever = start or components.build("retriever", model, self._whole)

    def fit(
        self,
        windows: SequenceLoader.Config,
        training: Training,
        folder: Path,
        *,
        context: Mapping[str, Any],
        tracker: Tracker | None = None,
        progress: TrainingProgress | None = None,
    ) -> History:
        """Train on the joined histories, or go on with what stands in the folder; validation is the mean over the catalogues.

        Args:
            windows: of the histories.
            training: batch size and trainer.
            folder: of the checkpoints.
            context: what decides the training besides its configuration.
            tracker: told of every epoch.
            progress: shown of every epoch.
        """
        domains = [Domain(source.name, source.train, source.items.count) for source in self._sources]
        loader = SequenceLoader(joined(domains), self.model.max_length, training.batch_size, self._seed, config=windows)
        self.model.replace_items(self._whole)
        known = {**context, "items": self._whole.digest()}
        trainer = Trainer(training.trainer, folder, tracker=tracker, progress=progress, context=known)
        return trainer.fit(self.model, loader, self._measure)

    def ranks(self, data: SequenceData, items: ItemTable, steps: EvaluationSteps, *, exclude_seen: bool = True) -> np.ndarray:
        """The rank of every target of the steps among the items of a catalogue, which has codes; the model then stands on it."""
        self.model.replace_items(items)
        view = Catalogue([str(row) for row in range(items.count)]).snapshot()
        cls: type[Index] = components.get("index", vars(self._index)["name"])
        return model_ranks(self.model, data, steps, view, cls.over(self._index, self.model, view), exclude_seen=exclude_seen)

    def _measure(self, _: nn.Module) -> dict[str, float]:
        found = {}
        for source, coded in zip(self._sources, self._coded, strict=True):
            if source.valid is not None:
                ranks = self.ranks(source.data, coded, source.valid)
                found[source.name] = {"recall@10": float(recall_at(ranks, 10).mean()), "ndcg@10": float(ndcg_at(ranks, 10).mean())}
        self.model.replace_items(self._whole)
        means = {name: float(np.mean([own[name] for own in found.values()])) for name in ("recall@10", "ndcg@10")}
        return means | {f"ndcg@10.{name}": own["ndcg@10"] for name, own in found.items()}
