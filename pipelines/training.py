# SPDX-License-Identifier: Apache-2.0
"""The training of a recipe's ranker, in this process or in several: ``torchrun -m pipelines.training FOLDER`` is one of them.

The folder holds ``job.json`` and ``encoder/``, which `together` writes, and then checkpoints, metrics and the trained weights.
"""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from recsys.core import components
from recsys.core.config import validate
from recsys.core.errors import RecsysError
from recsys.core.files import read_json, write_json
from recsys.data.batch import RankingBatch
from recsys.data.encode import Encoder
from recsys.data.loader import ParquetLoader, TableLoader
from recsys.data.world import World
from recsys.embedding.sharding import full_state
from recsys.evaluation.metrics.auc import auc
from recsys.evaluation.metrics.log_loss import log_loss
from recsys.evaluation.together import predictions
from recsys.ranking.calibration import undersampling_correction
from recsys.ranking.model import Ranker
from recsys.training.launch import Attempts, command, environment, join
from recsys.training.preemption import RESUMABLE
from recsys.training.tracking import NullTracker, Tracker
from recsys.training.trainer import Trainer

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

Curve = list[dict[str, Any]]
_CHUNK = 4096
_JOB, _ENCODER, _WEIGHTS, _CURVE = "job.json", "encoder", "weights.safetensors", "curve.json"
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
    if not (folder / _ENCODER).is_dir():
        (folder / _ENCODER).mkdir()
        encoder.save(folder / _ENCODER)
    job = {"recipe": recipe.model_dump(mode="json"), "rows": str(rows), "valid": str(valid), "context": context}
    write_json(folder / _JOB, job)
    done = subprocess.run(command(["-m", "pipelines.training", str(folder)], processes, _RESTARTS), env=dict(environment()), check=False)
    if done.returncode < 0 or done.returncode == RESUMABLE:
        raise SystemExit(RESUMABLE)
    if done.returncode or not (folder / _CURVE).is_file():
        raise RecsysError(f"the training in {processes} processes ended with status {done.returncode}; what they said stands above")
    ranker: Ranker = components.get("ranker", recipe.ranker.model.name)(recipe.ranker.model, encoder.spec)
    ranker.load_state_dict(load_file(folder / _WEIGHTS))
    return ranker, read_json(folder / _CURVE)


def main(argv: list[str]) -> None:
    """One process of `together`."""
    from pipelines.recipe import Recipe

    folder = Path(argv[0])
    with Attempts(folder):
        world = join()
        job = read_json(folder / _JOB)
        recipe, encoder = validate(Recipe, job["recipe"]), Encoder.load(folder / _ENCODER)
        valid = pq.read_table(job["valid"])
        ranker, curve = fit_ranker(recipe, encoder, Path(job["rows"]), valid, folder, NullTracker(), job["context"])
        state = full_state(ranker)
        if world.rank == 0:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / _WEIGHTS)
            write_json(folder / _CURVE, curve)
        dist.barrier()
        dist.destroy_process_group()


def _labels(batch: RankingBatch) -> np.ndarray:
    assert batch.labels is not None
    return batch.labels[:, 0].numpy().astype(np.float64)


if __name__ == "__main__":
    main(sys.argv[1:])
