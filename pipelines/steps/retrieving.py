# SPDX-License-Identifier: Apache-2.0
"""What the trainings of both retrievers share."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipelines.steps.histories import VALIDATION_STEPS, Histories
from recsys.core import components
from recsys.core.config import Config
from recsys.core.files import read_json, write_json
from recsys.data.windows import SequenceLoader
from recsys.evaluation.metrics.ranking import ndcg_at, recall_at
from recsys.evaluation.retrieval import model_ranks
from recsys.retrieval.base import CodeRetriever, Retriever
from recsys.retrieval.catalogue import Catalogue, Index, check_pair
from recsys.retrieval.items import ItemTable
from recsys.training.tracking import Tracker
from recsys.training.trainer import Trainer

if TYPE_CHECKING:
    from pipelines.recipe import RetrieverRecipe

_METRICS, _CURVE = "metrics.jsonl", "curve.json"

Curve = list[dict[str, Any]]


def seeded(items: ItemTable, seed: int) -> ItemTable:
    """The items, with torch's random state set for a model that is built over them."""
    torch.manual_seed(seed)
    return items


def build_index(config: Config, retriever: Retriever, catalogue: Catalogue) -> Index:
    """The index over the retriever's items, checked to fit it."""
    cls: type[Index] = components.get("index", vars(config)["name"])
    check_pair(retriever, cls)
    return cls.over(config, retriever, catalogue.snapshot())


def fit(
    model: Retriever,
    recipe: "RetrieverRecipe",
    index: Config | None,
    histories: Histories,
    seed: int,
    folder: Path,
    tracker: Tracker,
    context: dict[str, Any],
) -> Curve:
    """Train a model in place.

    Args:
        model: on its items.
        recipe: windows and training.
        index: by which validation asks a model over codes; None for one over vectors.
        histories: to train and validate on.
        seed: of every random choice.
        folder: of checkpoints and metrics.
        tracker: told of the training.
        context: what decides the training besides its configuration.
    """
    assert recipe.training is not None
    loader = SequenceLoader(histories.train, model.max_length, recipe.training.batch_size, seed, config=recipe.windows)
    steps, view = histories.valid.sample(VALIDATION_STEPS, seed), histories.catalogue.snapshot()

    # Over codes, which training leaves as they are, so that one index serves every validation.
    built = build_index(index, model, histories.catalogue) if index is not None and isinstance(model, CodeRetriever) else None

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Retriever)
        ranks = model_ranks(module, histories.data, steps, view, built)
        return {"recall@10": float(recall_at(ranks, 10).mean()), "ndcg@10": float(ndcg_at(ranks, 10).mean())}

    return Trainer(recipe.training.trainer, folder, tracker=tracker, context=context).fit(model, loader, validate).rows()


def save_curve(curve: Curve, folder: Path, out: Path) -> None:
    """Keep a training's curve and metrics."""
    write_json(out / _CURVE, curve)
    shutil.copy(folder / _METRICS, out)


def load_curve(directory: Path) -> Curve | None:
    """What `save_curve` kept; None where nothing was trained."""
    path = directory / _CURVE
    curve: Curve | None = read_json(path) if path.is_file() else None
    return curve
