# SPDX-License-Identifier: Apache-2.0
"""Start a training in several processes by Ray Train: the program that torchrun would run, on the workers of a ``TorchTrainer``.

Ray makes the process group and starts all workers anew where one was lost. Checkpoints are the program's own, so that it goes on from
them whoever started it; Ray's are not used. All workers see the same folder under the same path, and have this package installed.
"""

import logging
import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

from recsys.core.engine import Engine, import_ray, started
from recsys.core.errors import ConfigError
from recsys.core.files import read_json, write_bytes
from recsys.training.launch import FAILED, RUN, TIMEOUT, failure
from recsys.training.preemption import RESUMABLE, STOP, Sigterm

_LOST = 1  # the exit status where workers were lost more often than they may be, as torchrun has it


def run(program: Sequence[str], engine: Engine, folder: Path, restarts: int = 0, timeout: timedelta = TIMEOUT) -> int:
    """Run ``program`` on as many workers as the engine has, until it ends.

    SIGTERM to this process becomes a file in ``folder``, at which the workers look after each step; they save and end. They are threads of
    Ray's processes, so that a signal to one of them ends it without a checkpoint, and it counts as lost.

    Args:
        program: a Python file, or ``-m`` and a module, and its arguments.
        engine: a Ray cluster, or none to start one on this machine; a CPU for each worker, and a GPU where there are enough.
        folder: seen by all workers, for what Ray keeps of the run and for messages to the workers.
        restarts: how often all workers are started anew after one was lost.
        timeout: of a collective.

    Returns:
        0, `RESUMABLE` where SIGTERM came, `FAILED` for an error that another attempt would meet again, or 1.

    Raises:
        ConfigError: Ray Train is not installed, or the number of restarts is below 0.
    """
    if restarts < 0:
        raise ConfigError(f"expected at least 0 restarts, got {restarts}")
    name, folder = uuid4().hex[:12], folder.absolute()
    stop, failed = folder / f"stop-{name}", failure(folder, name)
    with started(engine, told=True):
        train = _ray_train()
        gpus = import_ray().cluster_resources().get("GPU", 0) >= engine.workers
        trainer = train.torch.TorchTrainer(
            _work,
            train_loop_config={"program": list(program), "environment": {RUN: name, STOP: str(stop)}},
            torch_config=train.torch.TorchConfig("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=int(timeout.total_seconds())),
            scaling_config=train.ScalingConfig(num_workers=engine.workers, use_gpu=gpus),
            run_config=train.RunConfig(
                name=name, storage_path=str(folder / "ray"), failure_config=train.FailureConfig(max_failures=restarts)
            ),
        )
        try:
            with Sigterm(lambda: write_bytes(stop, b"")) as sigterm:
                status = int(trainer.fit().return_value)
        except train.TrainingFailedError as error:
            print(error, file=sys.stderr, flush=True)
            status = RESUMABLE if sigterm.came else _LOST
        finally:
            stop.unlink(missing_ok=True)
    if failed.exists():  # what the workers wrote may not have come through
        print(read_json(failed)["error"], file=sys.stderr, flush=True)
        return FAILED
    return status


def _ray_train() -> ModuleType:
    """Ray Train with PyTorch; `ConfigError` where it is not installed."""
    try:
        import ray.train
        import ray.train.torch
    except ImportError as error:
        raise ConfigError(f"engine: ray: {error}; install it with pip install 'recsys-scaling[ray]', or use the engine local") from None
    module: ModuleType = ray.train
    return module


def _work(task: Mapping[str, Any]) -> int:
    """The exit status of the program in this worker."""
    logging.getLogger().setLevel(logging.WARNING)  # as in any process; Ray Train tells more
    first, *rest = task["program"]
    with _environment(task["environment"]), _arguments(rest if first == "-m" else [first, *rest]):
        try:
            if first == "-m":
                runpy.run_module(rest[0], run_name="__main__")
            else:
                runpy.run_path(first, run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)


@contextmanager
def _arguments(arguments: Sequence[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, list(arguments)
    try:
        yield
    finally:
        sys.argv = before
