# SPDX-License-Identifier: Apache-2.0
"""The training of a recipe's ranker, in this process or in several, of which each is a `pipelines.training_process`.

What they need stands in a folder: ``job.json`` and ``encoder/``, which `together` writes, and then checkpoints, metrics and the trained
weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from recsys.core import components
from recsys.core.errors import RecsysError
from recsys.core.files import read_json, write_json
from recsys.data.batch import RankingBatch
from recsys.data.encode import Encoder
from recsys.data.loader import ParquetLoader
from recsys.data.world import World
from recsys.evaluation.metrics.auc import auc
from recsys.evaluation.metrics.log_loss import log_loss
from recsys.evaluation.together import predictions
from recsys.ranking.calibration import undersampling_correction
from recsys.ranking.model import Ranker
from recsys.training.launch import run
from recsys.training.preemption import RESUMABLE
from recsys.training.tracking import Tracker
from recsys.training.trainer import Trainer

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

Curve = list[dict[str, Any]]
CHUNK = 4096  # rows of a batch that is only predicted
JOB, ENCODER, WEIGHTS, CURVE = "job.json", "encoder", "weights.safetensors", "curve.json"
_PROCESS = "pipelines.training_process"  # by name, since it knows all of a recipe, which is no part of this code
_RESTARTS = 3


@dataclass(frozen=True)
class Validation:
    """Encoded rows to validate on.

    Attributes:
        batches: this process's share of each ``CHUNK`` rows, in their order.
        rows: how many all processes have together.
    """

    batches: Sequence[RankingBatch]
    rows: int


def fit_ranker(
    recipe: "Recipe", encoder: Encoder, rows: Path, valid: Validation, folder: Path, tracker: Tracker, context: dict[str, Any]
) -> tuple[Ranker, Curve]:
    """Train the ranker with early stopping on validation; all processes of torch's default group do so together.

    Args:
        recipe: its ranker and seed.
        encoder: fitted.
        rows: the Parquet file to train on.
        valid: the rows to validate on, this process's share of them.
        folder: of checkpoints and metrics.
        tracker: told of the training.
        context: what decides the training besides its configuration.
    """
    world, training = World.current(), recipe.ranker.training
    torch.manual_seed(recipe.seed)
    ranker: Ranker = components.get("ranker", recipe.ranker.model.name)(recipe.ranker.model, encoder.spec)
    loader: ParquetLoader[RankingBatch] = ParquetLoader([rows], encoder, batch_size=training.batch_size, seed=recipe.seed, world=world)
    labels = predictions(labels_of, valid.batches, valid.rows, CHUNK)

    def check(model: nn.Module) -> dict[str, float]:
        given = predictions(partial(predicted, model), valid.batches, valid.rows, CHUNK)
        corrected = undersampling_correction(given, recipe.ranker.negatives)
        return {"auc": auc(labels, corrected), "logloss": log_loss(labels, corrected)}

    history = Trainer(training.trainer, folder, tracker=tracker, context=context).fit(ranker, loader, check)
    return ranker, history.rows()


def together(
    recipe: "Recipe", encoder: Encoder, rows: Path, valid: Path, folder: Path, context: dict[str, Any], processes: int
) -> tuple[Ranker, Curve]:
    """`fit_ranker` in several processes of this machine, which are started anew where one is lost.

    Raises:
        RecsysError: they ended without a result; what they said stands above.
        SystemExit: with status `RESUMABLE`, where SIGTERM came, or torchrun was killed: run again to go on from the last checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ENCODER).is_dir():
        (folder / ENCODER).mkdir()
        encoder.save(folder / ENCODER)
    job = {"recipe": recipe.model_dump(mode="json"), "rows": str(rows), "valid": str(valid), "context": context}
    write_json(folder / JOB, job)
    status = run(["-m", _PROCESS, str(folder)], processes, _RESTARTS)
    if status == RESUMABLE:
        raise SystemExit(RESUMABLE)
    if status or not (folder / CURVE).is_file():
        raise RecsysError(f"the training in {processes} processes ended with status {status}; what they said stands above")
    ranker: Ranker = components.get("ranker", recipe.ranker.model.name)(recipe.ranker.model, encoder.spec)
    ranker.load_state_dict(load_file(folder / WEIGHTS))
    return ranker, read_json(folder / CURVE)


def labels_of(batch: RankingBatch) -> np.ndarray:
    """The labels of the first task, float64 ``[rows]``."""
    assert batch.labels is not None
    return batch.labels[:, 0].numpy().astype(np.float64)


def predicted(model: nn.Module, batch: RankingBatch) -> np.ndarray:
    """The probabilities of the first task, float64 ``[rows]``, of a ranker in evaluation mode."""
    assert isinstance(model, Ranker)
    return model.predict(batch)[:, 0].numpy().astype(np.float64)
