# SPDX-License-Identifier: Apache-2.0
"""One trainer for rankers and retrievers: epochs, schedule, early stopping, and a run that goes on where it was killed, bit for bit."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

from kernels import backend
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError, DataError
from recsys.core.memory import keep_freed_memory
from recsys.data.loader import Loader
from recsys.data.world import World
from recsys.training.checkpoint import Checkpointing
from recsys.training.guards import Guards
from recsys.training.history import EpochRecord, History
from recsys.training.loop import OPERATIONAL, NonFiniteError, Poisoned, Run, Validate
from recsys.training.optim import DenseOptimizer, Schedule
from recsys.training.parallel import Distribution
from recsys.training.preemption import Preempted, Sigterm
from recsys.training.progress import NoProgress, RichProgress, TrainingProgress
from recsys.training.tracking import JsonlTracker, NullTracker, Prefixed, Tracker

__all__ = ["EpochRecord", "History", "Monitor", "NonFiniteError", "Preempted", "Trainer", "Validate"]


class Monitor(BaseConfig):
    """Which metric decides the best weights, and when to stop waiting for better ones.

    Attributes:
        metric: a name among what validation returns.
        mode: whether more or less of it is better.
        patience: stop after so many validations without improvement; None for never.
    """

    metric: str
    mode: Literal["max", "min"] = "max"
    patience: int | None = Field(None, ge=1)

    def better(self, value: float, best: float | None) -> bool:
        """Whether ``value`` improves on ``best``. NaN never does."""
        if best is None or math.isnan(best):
            return not math.isnan(value)
        return value > best if self.mode == "max" else value < best


class Trainer:
    """Trains a model in ``run_dir``; a run that was interrupted there goes on, and one that was finished is loaded.

    Everything that decides the course of the run is in its checkpoints: weights, the state of dense and fused optimizers, random
    generators, the loader's cursor, step, best epoch and history. On one CPU thread a run that was killed anywhere and started again ends
    with the same weights, state and history, bit for bit, as one that was not.

    Where torch has a process group, all its processes train the model together (`recsys.training.parallel.Together`): each makes the same
    call, with a loader over its share of every batch (``world=World.current()``). Batch sizes are those of all processes together, and a
    run that any number of processes began goes on in any other number.

    Args:
        config: see `Config`.
        run_dir: of this training alone: ``checkpoints/`` and ``metrics.jsonl`` stand there. Its last part is put before the names given to
            ``tracker``, as in ``ranker/loss``.
        tracker: records parameters and metrics, besides ``metrics.jsonl``.
        progress: a bar in a terminal and a line for each epoch elsewhere, by default.
        context: what else decides the course of the run and is fit for JSON, such as the seed and the data's fingerprint. To continue with
            another one is an error.
    """

    class Config(BaseConfig):
        """How to train.

        Attributes:
            epochs: at most how many.
            optimizer: of the dense parameters; fused tables bring their own.
            schedule: of all learning rates, dense and fused.
            clip_norm: scale the dense gradients down to this global norm; None for no clipping.
            precision: ``bf16`` runs the forward pass under autocast; ``auto`` is bf16 on a GPU with bf16 units, else fp32 (on a CPU
                always fp32).
            monitor: early stopping and best weights; None keeps the last weights.
            validate_every: epochs between validations; the last epoch is always validated.
            compile: compile the model's dense part (its method ``compile_dense``) with ``torch.compile``: worth its half minute where a run
                is long. Results differ from those without it in the last digits.
            kernels: which implementations of `kernels` run: ``auto`` follows the committed table, the others are for comparisons. Results
                differ in the last digits. Every checkpoint says what was asked, which table there was, and what ran.
            max_skipped: a step whose batch is not as it should be, or whose loss or gradient norm is not finite, is left out; one more
                than this many is an error. Fused tables
                are updated in the backward pass, so where there are any, a gradient norm that is not finite takes the run back to the last
                checkpoint, from where it goes on without that step.
            guards: what is watched besides.
            distribution: of tables and of everything else, where several processes train.
            log_every: steps between the records of a step's metrics.
            checkpoint: how often to save.
        """

        epochs: int = Field(ge=1)
        optimizer: DenseOptimizer = DenseOptimizer()
        schedule: Schedule = Schedule()
        clip_norm: float | None = Field(None, gt=0)
        precision: Literal["auto", "fp32", "bf16"] = "auto"
        compile: bool = False
        kernels: backend.Asked = "auto"
        monitor: Monitor | None = None
        validate_every: int = Field(1, ge=1)
        max_skipped: int = Field(10, ge=0)
        guards: Guards = Guards()
        distribution: Distribution = Distribution()
        log_every: int = Field(50, ge=1)
        checkpoint: Checkpointing = Checkpointing()

    def __init__(
        self,
        config: Config,
        run_dir: Path | str,
        tracker: Tracker | None = None,
        progress: TrainingProgress | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.run_dir = Path(run_dir)
        self.tracker = Prefixed(tracker or NullTracker(), self.run_dir.name)
        self.metrics = JsonlTracker(self.run_dir / "metrics.jsonl")
        self.progress = progress or (NoProgress() if World.current().rank else RichProgress(self.run_dir.name))
        self.context = dict(context or {})

    def fit(self, model: nn.Module, loader: Loader[Any], validate: Validate | None = None) -> History:
        """Train ``model`` in place; it ends in evaluation mode, with the best weights where there is a monitor.

        Args:
            model: with a method ``loss(batch) -> (scalar, parts)``, on its device.
            loader: batches that have a length, with a resumable cursor.
            validate: called after an epoch with the model in evaluation mode and gradients off; returns metrics.

        Raises:
            Preempted: SIGTERM came; the state was saved first.
            NonFiniteError: too many steps were not finite.
            CheckpointError: what ``run_dir`` holds is of another run, or damaged throughout.
            ConfigError: the monitored metric is not among those that ``validate`` returns.
            DataError: the loader has no batch, or too many batches were not as they should be.
        """
        if self.config.monitor and validate is None:
            raise ConfigError(f"monitor: {self.config.monitor.metric!r} is to be watched, but there is no validation")
        if len(loader) == 0:
            raise DataError("loader: there is no batch to train on")
        run = Run(self, model, loader, validate)
        if run.device.type == "cpu":
            keep_freed_memory()
        run.resume()
        with Sigterm() as run.sigterm, backend.session(self.config.kernels) as run.ran:
            try:
                while not run.state.finished:
                    try:
                        for _ in run.train_epoch():
                            run.save_if()
                        run.end_epoch()
                    except Poisoned:
                        run.go_back()
                run.trained.wait()
            finally:
                run.close()
        run.restore_best()
        return run.state.history(self.config.epochs)


class Training(BaseConfig):
    """How a model is trained, as a recipe says it."""

    batch_size: int = Field(ge=1)
    trainer: Trainer.Config

    def identity(self) -> dict[str, Any]:
        """What of it decides the result of a training, fit for JSON."""
        return {"batch_size": self.batch_size, "trainer": self.trainer.model_dump(mode="json", exclude=OPERATIONAL)}
