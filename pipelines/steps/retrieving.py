# SPDX-License-Identifier: Apache-2.0
"""What the trainings of both retrievers share: each in this process, or as one of several."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from pipelines.graph.step import Context
from pipelines.steps.histories import VALIDATION_STEPS, Histories, build_histories
from pipelines.steps.prepared import load_prepared
from pipelines.training import Curve, Job, alone, together
from recsys.bundle.item_table import load_item_table, save_item_table
from recsys.bundle.modules import load_module, save_module
from recsys.core import components
from recsys.core.config import Config
from recsys.core.engine import Engine
from recsys.core.files import new_directory, read_json, write_json
from recsys.data.windows import SequenceLoader
from recsys.data.world import World
from recsys.evaluation.metrics.ranking import ndcg_at, recall_at
from recsys.evaluation.retrieval import model_ranks
from recsys.evaluation.together import shared_ranks
from recsys.retrieval.base import CodeRetriever, Retriever
from recsys.retrieval.catalogue import Catalogue, Index, check_pair
from recsys.retrieval.items import ItemTable
from recsys.training.tracking import NullTracker, Tracker
from recsys.training.trainer import Trainer

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

_METRICS, _CURVE = "metrics.jsonl", "curve.json"
_START, _SPLITS, _ITEMS, _MODEL = "start", "splits", "items.safetensors", "model"

Which = Literal["retriever", "collaborative"]


@dataclass(frozen=True)
class Place:
    """Where a training stands.

    Attributes:
        folder: of checkpoints and metrics.
        context: what decides the training besides its configuration.
        splits: the result of the step that has the histories.
        tracker: told of the training, where it has one process.
        engine: where it runs, and in how many processes.
    """

    folder: Path
    context: dict[str, Any]
    splits: Path
    tracker: Tracker = field(default_factory=NullTracker)
    engine: Engine = field(default_factory=Engine)

    @classmethod
    def of(cls, context: Context, which: Which) -> "Place":
        """That of a step's training."""
        return cls(context.work / which, {"key": context.key}, context.inputs["splits"], context.tracker, context.engine)


def seeded(items: ItemTable, seed: int) -> ItemTable:
    """The items, with torch's random state set for a model that is built over them."""
    torch.manual_seed(seed)
    return items


def build_index(config: Config, retriever: Retriever, catalogue: Catalogue) -> Index:
    """The index over the retriever's items, checked to fit it."""
    cls: type[Index] = components.get("index", vars(config)["name"])
    check_pair(retriever, cls)
    return cls.over(config, retriever, catalogue.snapshot())


def fit(model: Retriever, items: ItemTable, recipe: "Recipe", which: Which, histories: Histories, place: Place) -> Curve:
    """Train a model in place, as the engine says; it ends in evaluation mode.

    Args:
        model: on its items.
        items: those.
        recipe: windows and training of the model, the index by which validation asks one over codes, and the seed of every random choice.
        which: of the recipe's retrievers it is.
        histories: to train and validate on.
        place: where the training stands.

    Raises:
        RecsysError: see `pipelines.training.together`.
        SystemExit: see there.
    """
    if alone(place.engine):
        return _fit(model, recipe, which, histories, place.folder, place.tracker, place.context)
    start = place.folder / _START
    if not start.is_dir():
        with new_directory(start) as directory:
            save_item_table(directory / _ITEMS, items)
            save_module(directory / _MODEL, model, extra=model.extra_state())
    inputs = {_START: start, _SPLITS: place.splits}
    job = Job(model=which, recipe=recipe.model_dump(mode="json"), inputs=inputs, context=place.context)
    state, curve = together(job, place.folder, place.engine)
    model.load_state_dict(state)
    model.eval()
    return curve


def fit_share(job: Job, recipe: "Recipe", folder: Path) -> tuple[Retriever, Curve]:
    """What one of the processes of `fit` does."""
    assert job.model != "ranker"
    start, histories = job.inputs[_START], build_histories(load_prepared(job.inputs[_SPLITS]))
    model: Retriever = load_module(start / _MODEL, "retriever", seeded(load_item_table(start / _ITEMS), recipe.seed))
    return model, _fit(model, recipe, job.model, histories, folder, NullTracker(), job.context)


def _fit(
    model: Retriever, recipe: "Recipe", which: Which, histories: Histories, folder: Path, tracker: Tracker, context: dict[str, Any]
) -> Curve:
    """Train a model in place; all processes of torch's default group do so together."""
    own = recipe.retriever if which == "retriever" else recipe.collaborative
    assert own.training is not None
    loader = SequenceLoader(
        histories.train, model.max_length, own.training.batch_size, recipe.seed, config=own.windows, world=World.current()
    )
    steps, view = histories.valid.sample(VALIDATION_STEPS, recipe.seed), histories.catalogue.snapshot()

    # Over codes, which training leaves as they are, so that one index serves every validation.
    built = build_index(recipe.index, model, histories.catalogue) if isinstance(model, CodeRetriever) else None

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Retriever)
        ranks = shared_ranks(lambda some: model_ranks(module, histories.data, some, view, built), steps)
        return {"recall@10": float(recall_at(ranks, 10).mean()), "ndcg@10": float(ndcg_at(ranks, 10).mean())}

    return Trainer(own.training.trainer, folder, tracker=tracker, context=context).fit(model, loader, validate).rows()


def save_curve(curve: Curve, folder: Path, out: Path) -> None:
    """Keep a training's curve and metrics."""
    write_json(out / _CURVE, curve)
    shutil.copy(folder / _METRICS, out)


def load_curve(directory: Path) -> Curve | None:
    """What `save_curve` kept; None where nothing was trained."""
    path = directory / _CURVE
    curve: Curve | None = read_json(path) if path.is_file() else None
    return curve
