# SPDX-License-Identifier: Apache-2.0
"""``torchrun -m pipelines.training_process FOLDER``: one of the processes of `pipelines.training.together`."""

import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

from pipelines.recipe import Recipe
from pipelines.steps import ranking, retrieving
from pipelines.training import CURVE, JOB, WEIGHTS, Job
from recsys.core.config import validate
from recsys.core.files import new_file, read_json, write_json
from recsys.embedding.sharding import full_state
from recsys.training.launch import Attempts, join

_SHARES = {"ranker": ranking.fit_share, "retriever": retrieving.fit_share, "collaborative": retrieving.fit_share}


def main(argv: list[str]) -> None:
    """Train as the folder's job says; the first process writes what comes of it."""
    folder = Path(argv[0])
    with Attempts(folder):
        world = join()
        job = validate(Job, read_json(folder / JOB))
        model, curve = _SHARES[job.model](job, validate(Recipe, job.recipe), folder)
        state = full_state(model)
        if world.rank == 0:
            with new_file(folder / WEIGHTS) as path:
                save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
            write_json(folder / CURVE, curve)
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
