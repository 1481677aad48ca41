# SPDX-License-Identifier: Apache-2.0
"""The training of a recipe's ranker, in this process or in several, of which each is a `pipelines.training_process`.

What they need stands in a folder: ``job.json`` and ``encoder/``, which `together` writes, and then checkpoints, metrics and the trained
weights.
"""

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file
from torch import nn

from recsys.core import components
from recsys.core.errors import RecsysError
from recsys.core.files import read_json, write_json
from recsys.data.batch import RankingBatch
from recsys.data.encode import Encoder
from recsys.data.loader import ParquetLoader, TableLoader
from recsys.data.world import World
from recsys.evaluation.metrics.auc import auc
from recsys.evaluation.metrics.log_loss import log_loss
from recsys.evaluation.together import predictions
from recsys.ranking.calibration import undersampling_correction
from recsys.ranking.model import Ranker
from recsys.training.launch import command, environment
from recsys.training.preemption import RESUMABLE
from recsys.training.tracking import Tracker
from recsys.training.trainer import Trainer

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

Curve = list[dict[str, Any]]
_CHUNK = 4096
JOB, ENCODER, WEIGHTS, CURVE = "job.json", "encoder", "weights.safetensors", "curve.json"
_PROCESS = "pipelines.training_process"  # by name, since it knows all of a recipe, which is no part of this code
_RESTARTS = 3


def fit_ranker(
    recipe: "Recipe", encoder: Encoder, rows: Path, valid: pa.Table, folder: Path, tracker: Tracker, context: dict[str, Any]
) -> tuple[Ranker, Curve]:
    """Train the ranker with early stopping on validation; all processes of torch's default group do so together.

    Args:
        recipe: its ranker and seed.
        encoder: fitted.
        rows: the Parquet file to train on.
        valid: the rows to validate on.
        folder: of checkpoints and metrics.
        tracker: told of the training.
        context: what decides the training besides its configuration.
    """
    world, training = World.current(), recipe.ranker.training
    torch.manual_seed(recipe.seed)
    ranker: Ranker = components.get("ranker", recipe.ranker.model.name)(recipe.ranker.model, encoder.spec)
    loader: ParquetLoader[RankingBatch] = ParquetLoader([rows], encoder, batch_size=training.batch_size, seed=recipe.seed, world=world)
    own = list(TableLoader(valid, encoder.transform, batch_size=_CHUNK, shuffle=False, world=world))
    labels = predictions(_labels, own, valid.num_rows, _CHUNK)

    def check(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Ranker)
        given = predictions(lambda batch: model.predict(batch)[:, 0].numpy().astype(np.float64), own, valid.num_rows, _CHUNK)
        predicted = undersampling_correction(given, recipe.ranker.negatives)
        return {"auc": auc(labels, predicted), "logloss": log_loss(labels, predicted)}

    history = Trainer(training.trainer, folder, tracker=tracker, context=context).fit(ranker, loader, check)
    return ranker, history.rows()


def together(
    recipe: "Recipe", encoder: Encoder, rows: Path, valid: Path, folder: Path, context: dict[str, Any], processes: int
) -> tuple[Ranker, Curve]:
    """`fit_ranker` in several processes of this machine, which are started anew where one is lost.

    Raises:
        RecsysError: they ended without a result; what they said stands above.
        SystemExit: they were asked to end, and saved what they had (see `recsys.training.preemption`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ENCODER).is_dir():
        (folder / ENCODER).mkdir()
        encoder.save(folder / ENCODER)
    job = {"recipe": recipe.model_dump(mode="json"), "rows": str(rows), "valid": str(valid), "context": context}
    write_json(folder / JOB, job)
    done = subprocess.run(command(["-m", _PROCESS, str(folder)], processes, _RESTARTS), env=dict(environment()), check=False)
    if done.returncode < 0 or done.returncode == RESUMABLE:
        raise SystemExit(RESUMABLE)
    if done.returncode or not (folder / CURVE).is_file():
        raise RecsysError(f"the training in {processes} processes ended with status {done.returncode}; what they said stands above")
    ranker: Ranker = components.get("ranker", recipe.ranker.model.name)(recipe.ranker.model, encoder.spec)
    ranker.load_state_dict(load_file(folder / WEIGHTS))
    return ranker, read_json(folder / CURVE)


def _labels(batch: RankingBatch) -> np.ndarray:
    assert batch.labels is not None
    return batch.labels[:, 0].numpy().astype(np.float64)
