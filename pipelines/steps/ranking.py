# SPDX-License-Identifier: Apache-2.0
"""The training of a recipe's ranker, in this process or as one of several."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn

from pipelines.training import Curve, Job, together
from recsys.core import components
from recsys.core.engine import Engine
from recsys.core.files import new_directory
from recsys.data.batch import RankingBatch
from recsys.data.encode import Encoder
from recsys.data.loader import ParquetLoader, TableLoader
from recsys.data.world import World
from recsys.evaluation.metrics.auc import auc
from recsys.evaluation.metrics.log_loss import log_loss
from recsys.evaluation.together import predictions
from recsys.ranking.calibration import undersampling_correction
from recsys.ranking.model import Ranker
from recsys.training.tracking import NullTracker, Tracker
from recsys.training.trainer import Trainer

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

CHUNK = 4096  # rows of a batch that is only predicted
_ENCODER, _ROWS, _VALID = "encoder", "rows", "valid"


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
    ranker = _untrained(recipe, encoder)
    loader: ParquetLoader[RankingBatch] = ParquetLoader([rows], encoder, batch_size=training.batch_size, seed=recipe.seed, world=world)
    labels = predictions(labels_of, valid.batches, valid.rows, CHUNK)

    def check(model: nn.Module) -> dict[str, float]:
        given = predictions(partial(predicted, model), valid.batches, valid.rows, CHUNK)
        corrected = undersampling_correction(given, recipe.ranker.negatives)
        return {"auc": auc(labels, corrected), "logloss": log_loss(labels, corrected)}

    history = Trainer(training.trainer, folder, tracker=tracker, context=context).fit(ranker, loader, check)
    return ranker, history.rows()


def fit_together(
    recipe: "Recipe", encoder: Encoder, rows: Path, valid: Path, folder: Path, context: dict[str, Any], engine: Engine
) -> tuple[Ranker, Curve]:
    """`fit_ranker` in several processes; ``valid`` is the Parquet file to validate on. For errors see `pipelines.training.together`."""
    if not (folder / _ENCODER).is_dir():
        with new_directory(folder / _ENCODER) as directory:
            encoder.save(directory)
    inputs = {_ENCODER: folder / _ENCODER, _ROWS: rows, _VALID: valid}
    job = Job(model="ranker", recipe=recipe.model_dump(mode="json"), inputs=inputs, context=context)
    state, curve = together(job, folder, engine)
    ranker = _untrained(recipe, encoder)
    ranker.load_state_dict(state)
    return ranker, curve


def fit_share(job: Job, recipe: "Recipe", folder: Path) -> tuple[Ranker, Curve]:
    """What one of the processes of `fit_together` does."""
    encoder, table = Encoder.load(job.inputs[_ENCODER]), pq.read_table(job.inputs[_VALID])
    own = list(TableLoader(table, encoder.transform, batch_size=CHUNK, shuffle=False, world=World.current()))
    valid = Validation(own, table.num_rows)
    return fit_ranker(recipe, encoder, job.inputs[_ROWS], valid, folder, NullTracker(), job.context)


def labels_of(batch: RankingBatch) -> np.ndarray:
    """The labels of the first task, float64 ``[rows]``."""
    assert batch.labels is not None
    return batch.labels[:, 0].numpy().astype(np.float64)


def predicted(model: nn.Module, batch: RankingBatch) -> np.ndarray:
    """The probabilities of the first task, float64 ``[rows]``, of a ranker in evaluation mode."""
    assert isinstance(model, Ranker)
    return model.predict(batch)[:, 0].numpy().astype(np.float64)


def _untrained(recipe: "Recipe", encoder: Encoder) -> Ranker:
    ranker: Ranker = components.get("ranker", recipe.ranker.model.name)(recipe.ranker.model, encoder.spec)
    return ranker
