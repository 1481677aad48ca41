# SPDX-License-Identifier: Apache-2.0
"""``torchrun -m pipelines.training_process FOLDER``: one of the processes of `pipelines.training.together`."""

import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch.distributed as dist
from safetensors.torch import save_file

from pipelines.recipe import Recipe
from pipelines.training import CHUNK, CURVE, ENCODER, JOB, WEIGHTS, Validation, fit_ranker
from recsys.core.config import validate
from recsys.core.files import read_json, write_json
from recsys.data.encode import Encoder
from recsys.data.loader import TableLoader
from recsys.embedding.sharding import full_state
from recsys.training.launch import Attempts, join
from recsys.training.tracking import NullTracker


def main(argv: list[str]) -> None:
    """Train as the folder's job says; the first process writes what comes of it."""
    folder = Path(argv[0])
    with Attempts(folder):
        world = join()
        job = read_json(folder / JOB)
        recipe, encoder = validate(Recipe, job["recipe"]), Encoder.load(folder / ENCODER)
        table = pq.read_table(job["valid"])
        own = list(TableLoader(table, encoder.transform, batch_size=CHUNK, shuffle=False, world=world))
        valid = Validation(own, table.num_rows)
        ranker, curve = fit_ranker(recipe, encoder, Path(job["rows"]), valid, folder, NullTracker(), job["context"])
        state = full_state(ranker)
        if world.rank == 0:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
            write_json(folder / CURVE, curve)
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
