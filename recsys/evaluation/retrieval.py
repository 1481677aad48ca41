# SPDX-License-Identifier: Apache-2.0
"""The rank of every event of a period under a retriever, and figures of all of them and of slices.

Ranking is over the whole catalogue, in chunks of histories, so that memory holds the scores of one chunk at a time. Repeats (targets that
are in their history already) are a slice of their own: a list that leaves out what was seen misses them all, one that does not may
win by them alone. Whoever ranks data that have some should ask both ways (``exclude_seen``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recsys.data.batch import SequenceBatch
from recsys.data.jagged import Jagged
from recsys.data.sequences import EvaluationSteps, SequenceData, histories
from recsys.evaluation.bootstrap import Interval, paired_mean_difference
from recsys.evaluation.full_ranking import target_ranks
from recsys.evaluation.metrics.ranking import ndcg_at, recall_at
from recsys.retrieval.base import Retriever, VectorRetriever
from recsys.retrieval.catalogue import CatalogueView, GatherIndex, Index
from recsys.retrieval.state import SlotLogProbs

Scorer = Callable[[SequenceBatch], np.ndarray]
"""From histories to the scores ``[B, N]`` of all items."""

_CHUNK = 256
_COLD_USER = 3  # events before the target, at most
_HEAD = 0.2  # share of the items, by training events


def vector_scorer(model: VectorRetriever) -> Scorer:
    """Scores of all items by inner products; those that the model cannot score get -inf."""
    with torch.no_grad():
        items_nd = model.eval().item_vectors()
    unscorable = ~model.scorable.to(items_nd.device)

    @torch.inference_mode()
    def score(batch: SequenceBatch) -> np.ndarray:
        scores = model.encode(batch.to(items_nd.device)).flat() @ items_nd.T
        found: np.ndarray = scores.masked_fill_(unscorable, -torch.inf).cpu().numpy()
        return found

    return score


def gather_scorer(model: Retriever, index: GatherIndex) -> Scorer:
    """Scores of all items by an index of codes."""
    device = _device(model.eval())

    @torch.inference_mode()
    def score(batch: SequenceBatch) -> np.ndarray:
        state = model.encode(batch.to(device))
        assert isinstance(state, SlotLogProbs)
        return index.score_all(state)

    return score


def event_ranks(
    scorer: Scorer, data: SequenceData, steps: EvaluationSteps, max_length: int, *, exclude_seen: bool = True, chunk: int = _CHUNK
) -> np.ndarray:
    """The rank of every target of every step among all items: float64 ``[targets]``, 1 is best.

    Args:
        scorer: of all items.
        data: the events that the steps are of.
        steps: what is to be predicted.
        max_length: the longest history that the scorer gets.
        exclude_seen: whether items of the history (all of it) are left out. A target that is one of them then has the rank infinity.
        chunk: steps at a time.
    """
    ranks, done = [], 0
    for batch, seen in histories(data, steps, max_length, chunk):
        targets = _targets(steps, done, len(batch))
        ranks.append(target_ranks(scorer(batch), targets, exclude=seen if exclude_seen else None))
        done += len(batch)
    return np.concatenate(ranks) if ranks else np.zeros(0)


@torch.inference_mode()
def list_ranks(
    model: Retriever,
    index: Index,
    view: CatalogueView,
    data: SequenceData,
    steps: EvaluationSteps,
    k: int,
    *,
    exclude_seen: bool = True,
    chunk: int = _CHUNK,
) -> np.ndarray:
    """The place of every target in the list of k items that an index makes: float64 ``[targets]``, infinity where it is not in it.

    For models whose scores of all items would cost too much, such as those that decode code by code; metrics up to k are as in serving.
    """
    device = _device(model.eval())
    ranks, done = [], 0
    for batch, seen in histories(data, steps, model.reach, chunk):
        targets = _targets(steps, done, len(batch))
        rows, _ = index.search(
            model.encode(batch.to(device)), k, view, exclude=tuple(seen) if exclude_seen else None, scorable=model.scorable
        )
        lists = rows[np.repeat(np.arange(len(batch)), np.diff(targets.offsets))]
        hit = lists == targets.values[:, None]
        ranks.append(np.where(hit.any(1), hit.argmax(1) + 1.0, np.inf))
        done += len(batch)
    return np.concatenate(ranks) if ranks else np.zeros(0)


def model_ranks(
    model: Retriever,
    data: SequenceData,
    steps: EvaluationSteps,
    view: CatalogueView,
    index: Index | None = None,
    *,
    places: int = 100,
    exclude_seen: bool = True,
) -> np.ndarray:
    """The rank of every target: among all items where that is cheap, else in lists of ``places`` items.

    Args:
        model: in whatever mode.
        data: the events that the steps are of.
        steps: what is to be predicted.
        view: of the catalogue, for lists.
        index: over the items, which a model of vectors does without.
        places: of a list.
        exclude_seen: whether items of the history are left out.
    """
    if isinstance(model, VectorRetriever):
        return event_ranks(vector_scorer(model), data, steps, model.reach, exclude_seen=exclude_seen)
    assert index is not None
    if isinstance(index, GatherIndex):
        return event_ranks(gather_scorer(model, index), data, steps, model.reach, exclude_seen=exclude_seen)
    return list_ranks(model, index, view, data, steps, places, exclude_seen=exclude_seen)


def _device(model: Retriever) -> torch.device:
    return next(model.parameters()).device


def _targets(steps: EvaluationSteps, begin: int, count: int) -> Jagged:
    offsets = steps.targets.offsets[begin : begin + count + 1]
    return Jagged(steps.targets.values[offsets[0] : offsets[-1]], offsets - offsets[0])


def slices(data: SequenceData, train: SequenceData, steps: EvaluationSteps, count: int) -> dict[str, np.ndarray]:
    """Which targets are of which kind.

    Args:
        data: the events that the steps are of.
        train: those of training.
        steps: what is to be predicted.
        count: N, items of the catalogue.

    Returns:
        bool ``[targets]`` by name: ``all``; ``new`` and ``repeated`` (not yet, or already in the history); ``warm`` and ``cold`` items
        (with training events or none); ``head`` (the fifth of the items with the most training events) and ``tail``; ``cold_user`` (1 to
        3 events before) and ``empty_user`` (none).
    """
    targets, owner = steps.targets.values, np.repeat(np.arange(len(steps)), np.diff(steps.targets.offsets))
    events = np.bincount(train.items, minlength=count)
    order = np.lexsort((np.arange(count), -events))
    head = np.zeros(count, bool)
    head[order[: max(1, int(_HEAD * count))]] = True
    before = (steps.event - steps.start)[owner]
    repeated = _repeated(data, steps, owner, targets)
    warm = events[targets] > 0
    return {
        "all": np.ones(len(targets), bool),
        "new": ~repeated,
        "repeated": repeated,
        "warm": warm,
        "cold": ~warm,
        "head": head[targets],
        "tail": ~head[targets],
        "cold_user": (before >= 1) & (before <= _COLD_USER),
        "empty_user": before == 0,
    }


def _repeated(data: SequenceData, steps: EvaluationSteps, owner: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Whether each target is in the history before its step."""
    user = np.searchsorted(data.offsets, steps.start, side="right") - 1
    key = data.owner * (data.items.max(initial=0) + 1) + data.items
    order = np.lexsort((np.arange(len(key)), key))  # events of a user and an item together, oldest first
    wanted = user[owner] * (data.items.max(initial=0) + 1) + targets
    first = np.searchsorted(key[order], wanted, side="left")
    found = np.append(order, len(key))[first]
    same = np.append(key, -1)[found] == wanted
    earlier: np.ndarray = same & (found < steps.event[owner])
    return earlier


@dataclass(frozen=True)
class Row:
    """A model's figures on a slice.

    Attributes:
        model: its name.
        slice: of the targets.
        targets: how many.
        metrics: by name, such as ``recall@10``; means over the targets.
        differences: of every metric to the baseline's, paired, with intervals over users; none for the baseline itself.
    """

    model: str
    slice: str
    targets: int
    metrics: Mapping[str, float]
    differences: Mapping[str, Interval]

    def as_json(self) -> dict[str, Any]:
        """The row as plain values."""
        differences = {name: [d.estimate, d.low, d.high] for name, d in self.differences.items()}
        return {"model": self.model, "slice": self.slice, "targets": self.targets, **self.metrics, "differences": differences}


def compare(
    ranks: Mapping[str, Sequence[np.ndarray]],
    steps: EvaluationSteps,
    chosen: Mapping[str, np.ndarray],
    *,
    baseline: str,
    cutoffs: Sequence[int] = (10,),
    resamples: int = 1000,
    level: float = 0.95,
) -> list[Row]:
    """The figures of every model on every slice that has targets.

    Args:
        ranks: of every target, by model: one array for each seed, of whose metrics the means over seeds are compared.
        steps: whose targets they are.
        chosen: masks over the targets, by slice.
        baseline: the model that all others are compared with.
        cutoffs: of recall and NDCG.
        resamples: of the bootstrap.
        level: of the intervals.

    Raises:
        KeyError: there is no such baseline.
    """
    users = np.asarray(steps.user_id.to_numpy(zero_copy_only=False))[np.repeat(np.arange(len(steps)), np.diff(steps.targets.offsets))]
    values = {model: _values(own, cutoffs) for model, own in ranks.items()}
    rows = []
    for name, mask in chosen.items():
        if not mask.any():
            continue
        for model, own in values.items():
            differences = {
                metric: paired_mean_difference(value[mask], values[baseline][metric][mask], users[mask], resamples=resamples, level=level)
                for metric, value in (own if model != baseline else {}).items()
            }
            means = {metric: float(value[mask].mean()) for metric, value in own.items()}
            rows.append(Row(model, name, int(mask.sum()), means, differences))
    return rows


def _values(ranks: Sequence[np.ndarray], cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    metrics = {"recall": recall_at, "ndcg": ndcg_at}
    return {f"{name}@{k}": np.mean([at(own, k) for own in ranks], axis=0) for name, at in metrics.items() for k in cutoffs}
