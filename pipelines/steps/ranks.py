# SPDX-License-Identifier: Apache-2.0
"""The rank of every test event under both retrievers and the baselines that they must beat."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from pipelines.steps.histories import VALIDATION_STEPS, Histories
from recsys.evaluation.metrics.ranking import recall_at
from recsys.evaluation.retrieval import Scorer, event_ranks, model_ranks
from recsys.evaluation.tuned_baselines import tuned_item_knn, tuned_text_knn
from recsys.retrieval.base import Retriever
from recsys.retrieval.baselines import Popularity, RepeatLast
from recsys.retrieval.catalogue import Index

Models = Mapping[str, tuple[Retriever, Index | None]]


def retrieval_ranks(models: Models, histories: Histories, text: Tensor, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The rank of every test event under each model, in the order of the test steps' targets.

    Args:
        models: by name, each with the index by which it is asked; None for the exact one.
        histories: whose test period it is.
        text: float32 ``[N, D_text]``, of the baseline by text.
        seed: of the validation steps on which baselines choose their settings.

    Returns:
        Ranks in lists without what the user has seen; and in lists with it, empty where no target is a repeat.
    """
    baselines = _baselines(histories, text, seed, max(model.max_length for model, _ in models.values()))
    ranks = _ranks(models, baselines, histories, exclude_seen=True)
    repeats = histories.slices()["repeated"].any()
    return ranks, _ranks(models, baselines, histories, exclude_seen=False) if repeats else {}


def _ranks(models: Models, baselines: Mapping[str, Scorer], histories: Histories, *, exclude_seen: bool) -> dict[str, np.ndarray]:
    """The rank of every test event under every model and baseline, which see equally long histories."""
    data, test, view = histories.data, histories.test, histories.catalogue.snapshot()
    longest = max(model.max_length for model, _ in models.values())
    ranks = {name: model_ranks(model, data, test, view, index, exclude_seen=exclude_seen) for name, (model, index) in models.items()}
    return ranks | {name: event_ranks(scorer, data, test, longest, exclude_seen=exclude_seen) for name, scorer in baselines.items()}


def _baselines(histories: Histories, text: Tensor, seed: int, max_length: int) -> dict[str, Scorer]:
    """What the models must beat, with the settings that the validation period prefers; they see what the models see."""
    train, count = histories.train, len(text)
    steps = histories.valid.sample(VALIDATION_STEPS, seed)

    def quality(scorer: Scorer) -> float:
        return float(recall_at(event_ranks(scorer, histories.data, steps, max_length), 10).mean())

    return {
        "item_knn": tuned_item_knn(train, count, quality).scores,
        "text_knn": tuned_text_knn(train, text, quality).scores,
        "repeat_last": RepeatLast(RepeatLast.Config()).fit(train, count).scores,
        "popularity": Popularity(Popularity.Config()).fit(train, count).scores,
    }
