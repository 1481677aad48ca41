# SPDX-License-Identifier: Apache-2.0
"""The training of one of a recipe's models in several processes, each of which is a `pipelines.training_process`.

What they need stands in a folder: ``job.json`` and what the model's step puts beside it. Then come checkpoints, metrics and the trained
weights.
"""

from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from recsys.core.config import Config
from recsys.core.engine import Engine
from recsys.core.errors import RecsysError
from recsys.core.files import read_json, write_json
from recsys.training.launch import launch
from recsys.training.preemption import RESUMABLE

Curve = list[dict[str, Any]]
Model = Literal["ranker", "retriever", "collaborative"]

JOB, WEIGHTS, CURVE = "job.json", "weights.safetensors", "curve.json"
_PROCESS = "pipelines.training_process"  # by name, since it knows all of a recipe, which is no part of this code
_RESTARTS = 3


class Job(Config):
    """What processes train, and from what.

    Attributes:
        model: which of the recipe's.
        recipe: all of it, as plain values.
        inputs: files and folders by name, as the model's step reads them; every process sees them.
        context: what decides the training besides its configuration.
    """

    model: Model
    recipe: dict[str, Any]
    inputs: dict[str, Path]
    context: dict[str, Any]


def alone(engine: Engine) -> bool:
    """Whether this process trains, and no other."""
    return engine.name == "local" and engine.workers == 1


def together(job: Job, folder: Path, engine: Engine) -> tuple[dict[str, Tensor], Curve]:
    """The state of the trained model and the curve of its training in several processes, which are started anew where one is lost.

    Args:
        job: what is trained.
        folder: of the job, checkpoints and metrics; every process sees it.
        engine: where the processes run, and how many.

    Raises:
        RecsysError: they ended without a result; what they said stands above.
        SystemExit: with status `RESUMABLE`, where SIGTERM came, or torchrun was killed: run again to go on from the last checkpoint.
    """
    folder = folder.absolute()  # Ray's workers stand in a folder of their own
    inputs = {name: path.absolute() for name, path in job.inputs.items()}
    write_json(folder / JOB, job.model_copy(update={"inputs": inputs}).model_dump(mode="json"))
    status = launch(["-m", _PROCESS, str(folder)], engine, folder, _RESTARTS)
    if status == RESUMABLE:
        raise SystemExit(RESUMABLE)
    if status or not (folder / CURVE).is_file():
        raise RecsysError(f"the training in {engine.workers} processes ended with status {status}; what they said stands above")
    return load_file(folder / WEIGHTS), read_json(folder / CURVE)
