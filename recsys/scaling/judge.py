# SPDX-License-Identifier: Apache-2.0
"""How well a retriever does on some steps: recall and NDCG of its lists, and the cross-entropy of what came; on warm and cold items too."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from recsys.data.sequences import EvaluationSteps, SequenceData, histories
from recsys.evaluation.metrics.ranking import ndcg_at, recall_at
from recsys.evaluation.retrieval import model_ranks, slices, vector_scorer
from recsys.retrieval.base import Retriever, VectorRetriever
from recsys.retrieval.catalogue import Catalogue, CatalogueView, Index
from recsys.scaling.retrieval_data import only

CUTOFF = 10
_CHUNK = 256


class Judge:
    """Measures models on the same steps, as a validation of `recsys.training.trainer.Trainer` does.

    ``recall@10``, ``ndcg@10`` and ``loss`` are means over targets, a loss over those that the model can score at all:

    - of a model of vectors, ``−log softmax`` of the target over all items that it can score, by its scores;
    - of a model of codes, its own `Retriever.loss`.

    Args:
        data: all events, of which histories are taken.
        train: all events that may be trained on, by which items are warm, however few of them a model is given.
        steps: what is to be predicted.
        count: N, items of the catalogue.
        index: over codes, for a model of codes.
        view: of the catalogue that the index is over.
    """

    def __init__(
        self,
        data: SequenceData,
        train: SequenceData,
        steps: EvaluationSteps,
        count: int,
        index: Index | None = None,
        view: CatalogueView | None = None,
    ) -> None:
        self._data, self._steps, self._index = data, steps, index
        self._view = view if view is not None else Catalogue().snapshot()
        self._masks = masks(data, train, steps, count)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The measures over all targets by name; the model is left in evaluation mode."""
        return {name: value for name, value in self.sliced(model).items() if "." not in name}

    def sliced(self, model: nn.Module) -> dict[str, float]:
        """The same, and each with ``.warm`` and ``.cold`` as `masks` has them; what there is no target for is left out."""
        assert isinstance(model, Retriever)
        ranks = model_ranks(model.eval(), self._data, self._steps, self._view, self._index, places=CUTOFF)
        figures = {f"recall@{CUTOFF}": recall_at(ranks, CUTOFF), f"ndcg@{CUTOFF}": ndcg_at(ranks, CUTOFF)}
        lists = {f"{name}{part}": float(v[m].mean()) for name, v in figures.items() for part, m in self._masks.items() if m.any()}
        return lists | self._losses(model)

    def _losses(self, model: Retriever) -> dict[str, float]:
        if isinstance(model, VectorRetriever):
            losses = target_losses(model, self._data, self._steps)
            known = np.isfinite(losses)
            return {f"loss{name}": float(losses[m & known].mean()) for name, m in self._masks.items() if (m & known).any()}
        parts = {name: only(self._steps, mask) for name, mask in self._masks.items() if name and mask.any()}
        counts = {name: len(steps.targets.values) for name, steps in parts.items()}
        means = {name: own_loss(model, self._data, steps) for name, steps in parts.items()}
        whole = sum(means[name] * count for name, count in counts.items()) / sum(counts.values())
        return {"loss": whole} | {f"loss{name}": mean for name, mean in means.items()}


def masks(data: SequenceData, train: SequenceData, steps: EvaluationSteps, count: int) -> dict[str, np.ndarray]:
    """bool ``[targets]``: all of them (of no name), those of items with training events (``.warm``), and of those without (``.cold``)."""
    found = slices(data, train, steps, count)
    return {"": found["all"], ".warm": found["warm"], ".cold": found["cold"]}


def target_losses(model: VectorRetriever, data: SequenceData, steps: EvaluationSteps) -> np.ndarray:
    """``−log softmax`` of every target over the scorable items: float64 ``[targets]``, infinite where the target is none of them."""
    scorer, losses, done = vector_scorer(model), [np.zeros(0)], 0
    for batch, _ in histories(data, steps, model.reach, _CHUNK):
        offsets = steps.targets.offsets[done : done + len(batch) + 1]
        row, targets = np.repeat(np.arange(len(batch)), np.diff(offsets)), steps.targets.values[offsets[0] : offsets[-1]]
        scores = torch.from_numpy(scorer(batch)).double()
        losses.append((scores.logsumexp(1)[row] - scores[row, targets]).numpy())
        done += len(batch)
    return np.concatenate(losses)


@torch.no_grad()
def own_loss(model: Retriever, data: SequenceData, steps: EvaluationSteps) -> float:
    """The mean over targets of a model's training loss, in evaluation mode; each is predicted from the last events before its step."""
    device = next(model.eval().parameters()).device
    total, done = 0.0, 0
    for batch, _ in histories(data, steps, model.max_length, _CHUNK):
        offsets = torch.from_numpy(steps.targets.offsets[done : done + len(batch) + 1])
        targets = torch.from_numpy(steps.targets.values[int(offsets[0]) : int(offsets[-1])])
        row = torch.repeat_interleave(torch.arange(len(batch)), offsets.diff())
        asked = replace(batch, targets=targets, target_row=row, target_position=batch.lengths[row])
        total += float(model.loss(asked.to(device))[0]) * len(targets)
        done += len(batch)
    return total / len(steps.targets.values)
