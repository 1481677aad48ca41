# SPDX-License-Identifier: Apache-2.0
"""What `recsys.training.trainer.Trainer.fit` does: steps, epochs, checkpoints, and what becomes of a step that goes wrong."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn

from kernels import backend, paths
from recsys.core.config import Config
from recsys.core.errors import ConfigError, DataError, RecsysError, unknown
from recsys.core.memory import give_back_memory, resident_bytes
from recsys.data.loader import Loader
from recsys.training.checkpoint import Checkpoint
from recsys.training.feed import Feed
from recsys.training.guards import Doing, Spikes, Watchdog
from recsys.training.history import EpochRecord, TrainState
from recsys.training.parallel import Alone, Together, Trained
from recsys.training.preemption import Preempted, Sigterm

if TYPE_CHECKING:
    from recsys.training.trainer import Trainer

Validate = Callable[[nn.Module], Mapping[str, float]]

# What may change between two parts of a run without changing its course.
OPERATIONAL = {"checkpoint", "distribution", "guards", "kernels", "log_every", "max_skipped"}

logger = logging.getLogger(__name__)


class NonFiniteError(RecsysError):
    """The loss or the gradients were NaN or infinite too often."""


class Poisoned(Exception):
    """A gradient that was not finite has reached the tables."""


class Run:
    """One call of `Trainer.fit`."""

    sigterm: Sigterm

    def __init__(self, trainer: "Trainer", model: nn.Module, loader: Loader[Any], validate: Validate | None) -> None:
        self.trainer, self.config = trainer, trainer.config
        self.model, self.loader, self.validate = model, loader, validate
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.bf16 = _use_bf16(self.config.precision, self.device)
        if self.config.compile:
            _compile(model)
        self.trained = self._trained()
        self.optimizers, self.world = self.trained.optimizers, self.trained.world
        self.state = TrainState()
        self.stop = self.due = False
        self.spikes = Spikes(self.config.guards)
        self.watchdog: Watchdog | None = None
        self.feed: Feed | None = None  # of the epoch that is being trained
        self.ran: set[backend.Choice] = set()
        self.ran_before: set[backend.Choice] = set()  # before this run was interrupted
        self.saved_at = time.monotonic()

    def _trained(self) -> Trained:
        config, root = self.config, self.trainer.run_dir / "checkpoints"
        given = (self.model, config.optimizer, root, config.checkpoint.keep, self._identity())
        return Together(*given, config.distribution) if dist.is_available() and dist.is_initialized() else Alone(*given)

    def _identity(self) -> dict[str, Any]:
        """What decides the course of the run, so that another one does not continue it by mistake."""
        model_config = getattr(self.model, "config", None)
        return {
            "trainer": self.config.model_dump(mode="json", exclude=OPERATIONAL),
            "model": model_config.model_dump(mode="json") if isinstance(model_config, Config) else type(self.model).__qualname__,
            "shapes": {name: list(parameter.shape) for name, parameter in self.model.named_parameters()},
            "batches": len(self.loader),
            "batch_size": getattr(self.loader, "batch_size", None),
            "context": self.trainer.context,
        }

    def resume(self) -> None:
        """Go to where the newest valid checkpoint stands, or to the beginning."""
        found = self.trained.latest()
        if found is None:
            self.loader.load_state_dict({"epoch": 0, "samples": 0})
            if self.optimizers.has_fused:
                self.save()  # where to go back to
        else:
            self._load(found)
            self.ran_before = {backend.Choice(*choice) for choice in found.read("kernels")["ran"]} if "kernels" in found else set()
            logger.info("%s: going on after step %d", found.directory, self.state.step)
        if self.world.size > 1 and self.config.guards.stuck_seconds is not None and self.watchdog is None:
            self.watchdog = Watchdog(self.trainer.run_dir / "processes", self.world, self.config.guards.stuck_seconds)
        self._begin_log()

    def _load(self, found: Checkpoint) -> None:
        """Go to a checkpoint, but for the steps that were found to be bad since."""
        bad = self.state.bad_steps
        self.state = TrainState.from_dict(found.read("progress"))
        self.state.bad_steps = sorted({*bad, *self.state.bad_steps})
        self.trained.load(found)
        self.loader.load_state_dict(found.read("loader"))

    def go_back(self) -> None:
        """To the last checkpoint, from where the step that did harm is left out."""
        self.state.bad_steps.append(self.state.step)
        self.trainer.progress.close()
        found = self.trained.latest()
        if found is None:
            raise NonFiniteError(f"step {self.state.step}: the gradient norm is not finite, and there is no checkpoint to go back to")
        step = self.state.step
        self._load(found)
        logger.warning("step %d: tables have taken a gradient that is not finite: back to step %d", step, self.state.step)
        self._begin_log()

    def _begin_log(self) -> None:
        self.logged = (self.state.step, time.monotonic())
        self.waited, self.samples = 0.0, 0
        if self.world.rank:
            return
        self.trainer.metrics.rewind(self.state.step)
        self.trainer.tracker.log_params({"trainer": self.config.model_dump(mode="json", exclude=OPERATIONAL)})

    def save(self) -> Path:
        """Write a checkpoint of everything."""
        self._note("saving")
        state = {
            "loader": (self.feed or self.loader).state_dict(),
            "progress": self.state.as_dict(),
            "kernels": {"asked": self.config.kernels, "table": paths.fingerprint(), "ran": sorted(map(list, self.ran_before | self.ran))},
        }
        path = self.trained.save(self.state.step, state, self.state.best_step)
        self.saved_at, self.due = time.monotonic(), False
        return path

    def train_epoch(self) -> Iterator[None]:
        """Train for what is left of the epoch, pausing after every step."""
        self.model.train()
        self.loader.set_epoch(self.state.epoch)
        self.trainer.progress.start_epoch(self.state.epoch + 1, self.config.epochs, len(self.loader), self.state.batch)
        self.feed = feed = self.trained.feed(self.loader)
        try:
            while (batch := self._next(feed)) is not None:
                self._note("training")
                loss = self._step(batch)
                self.trainer.progress.advance(self.state.step, loss, len(batch) * self.world.size)
                yield
        finally:
            feed.close()
            self.feed = None

    def _next(self, feed: Feed) -> Any:
        """The next batch, None at the end; the time that it took counts as waiting."""
        self._note("loading")
        began = time.monotonic()
        batch = next(feed, None)
        self.waited += time.monotonic() - began
        self.samples += 0 if batch is None else len(batch) * self.world.size
        return batch

    def _note(self, doing: Doing) -> None:
        if self.watchdog is not None:
            self.watchdog.note(self.state.step, doing)

    def _step(self, batch: Any) -> float:
        """Forward, backward, update; returns the loss."""
        factor = self.config.schedule.factor(self.state.step, self.config.epochs * len(self.loader))
        self.optimizers.begin_step(factor)
        self.state.step += 1
        self.state.batch += 1
        if self.state.step in self.state.bad_steps:
            self._skip("gradient norm", math.nan)
            return math.nan
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss, parts = self.trained.loss(batch)
        except DataError as error:
            self._skip_batch(error)
            return math.nan
        values = {"loss": float(loss.detach())} | {name: float(part) for name, part in parts.items() if name != "loss"}
        values, (self.stop, self.due) = self.trained.settle(values, [self.sigterm.came, self._overdue()])
        value = values["loss"]
        if not math.isfinite(value):
            self._skip("loss", value, self._diagnose(batch))
            return value
        loss.backward()
        norm = self.optimizers.gradient_norm()
        if not math.isfinite(norm):
            if self.optimizers.has_fused:
                raise Poisoned
            self._skip("gradient norm", norm)
            return value
        self.state.spikes += self.spikes.look(self.state.step, norm)
        if self.config.clip_norm is not None:
            self.optimizers.clip(self.config.clip_norm, norm)
        self.optimizers.step()
        self.state.count(values)
        if self.state.step % self.config.log_every == 0:
            self._log_step(values, norm, factor)
        return value

    def _diagnose(self, batch: Any) -> str | None:
        """What the model finds wrong with a batch, where it has a method ``diagnose``."""
        diagnose = getattr(self.model, "diagnose", None)
        return diagnose(batch) if diagnose is not None else None

    def _skip(self, what: str, value: float, why: str | None = None) -> None:
        self.state.skipped += 1
        logger.warning("step %d: the %s is %g: left out%s", self.state.step, what, value, f": {why}" if why else "")
        if self.state.skipped > self.config.max_skipped:
            raise NonFiniteError(
                f"step {self.state.step}: the {what} is {value:g}, as it was not finite in {self.state.skipped - 1} steps before "
                f"(max_skipped is {self.config.max_skipped}); {why or 'a lower learning rate, clip_norm or precision fp32 may help'}"
            )

    def _skip_batch(self, error: DataError) -> None:
        self.state.skipped += 1
        logger.warning("step %d: left out: %s", self.state.step, error)
        if self.state.skipped > self.config.max_skipped:
            before = self.state.skipped - 1
            raise DataError(
                f"step {self.state.step}: {error}; {before} steps before it were left out (max_skipped is {self.config.max_skipped})"
            ) from error

    def save_if(self) -> None:
        """After a step: save and end if asked to, or save if it is time.

        Not after the last step of an epoch: its validation comes first.
        """
        if self.stop:
            self._preempt()
        if self.state.batch < len(self.loader) and self._is_time():
            self.save()

    def _is_time(self) -> bool:
        every = self.config.checkpoint
        by_steps = every.every_steps is not None and self.state.step % every.every_steps == 0
        return by_steps or self.due

    def _overdue(self) -> bool:
        seconds = self.config.checkpoint.every_seconds
        return seconds is not None and time.monotonic() - self.saved_at >= seconds

    def _preempt(self) -> None:
        path = self.save()
        self.trained.wait()
        logger.warning("SIGTERM: saved %s; run again to go on", path)
        raise Preempted(path)

    def end_epoch(self) -> None:
        """Validate, decide whether this was the best or the last epoch, and save if so."""
        state, config = self.state, self.config
        last = state.epoch + 1 == config.epochs
        validation = self._validate() if last or (state.epoch + 1) % config.validate_every == 0 else {}
        record = state.end_epoch(validation)
        improved = bool(validation) and self._judge(record)
        patience = config.monitor.patience if config.monitor else None
        state.finished = last or (patience is not None and state.since_best >= patience)
        self.loader.set_epoch(state.epoch)
        values = {f"train_{name}": value for name, value in record.train.items()} | record.validation
        self._log(values | {"epoch": float(record.epoch)})
        self.trainer.progress.end_epoch(values)
        _, (self.stop, self.due) = self.trained.settle({}, [self.sigterm.came, self._overdue()])
        if self.stop:
            self._preempt()
        if improved or state.finished or self._is_time():
            self.save()
        give_back_memory()

    def _validate(self) -> dict[str, float]:
        if self.validate is None:
            return {}
        self._note("validating")
        self.model.eval()
        with torch.no_grad(), self.trained.whole():
            return self.trained.agree({name: float(value) for name, value in self.validate(self.model).items()})

    def _judge(self, record: EpochRecord) -> bool:
        """Whether the newest record is the best."""
        monitor, state = self.config.monitor, self.state
        if monitor is None:
            return False
        if monitor.metric not in record.validation:
            raise ConfigError(f"monitor.metric: {unknown('metric', monitor.metric, record.validation)}")
        best = None if state.best is None else state.records[state.best].validation[monitor.metric]
        improved = monitor.better(record.validation[monitor.metric], best)
        if improved:
            state.best, state.since_best = len(state.records) - 1, 0
        else:
            state.since_best += 1
        return improved

    def restore_best(self) -> None:
        """Put the best weights into the model, which may have trained on since."""
        best = self.state.best_step
        if best is not None and best != self.state.step:
            self.trained.load_weights(self.trained.at(best))
        self.model.eval()

    def close(self) -> None:
        """Leave nothing behind that outlives the run: no bar, no gradients, no decayed learning rate."""
        if self.watchdog is not None:
            self.watchdog.close()
        self.trainer.progress.close()
        self.optimizers.begin_step(1.0)

    def _log(self, values: dict[str, float]) -> None:
        if self.world.rank:
            return
        self.trainer.metrics.log_metrics(values, self.state.step)
        self.trainer.tracker.log_metrics(values, self.state.step)

    def _log_step(self, values: dict[str, float], norm: float, factor: float) -> None:
        (step, then), now = self.logged, time.monotonic()
        self.logged = (self.state.step, now)
        rate = {"learning_rate": self.config.optimizer.learning_rate * factor, "gradient_norm": norm}
        seconds = max(now - then, 1e-9)
        speed = {"steps_per_second": (self.state.step - step) / seconds, "samples_per_second": self.samples / seconds}
        speed |= {"waited_for_data": self.waited / seconds, "memory_gib": _memory(self.device) / 2**30}
        self.waited, self.samples = 0.0, 0
        self._log({f"batch_{name}": value for name, value in values.items()} | rate | speed)


def _compile(model: nn.Module) -> None:
    if not hasattr(model, "compile_dense"):
        raise ConfigError(f"compile: {type(model).__name__} has no method compile_dense")
    torch.compiler.reset()  # it keeps at most eight variants of a forward pass, those of other models among them, and then gives up
    cast(Any, model).compile_dense()


def _memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or what the process holds."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()


def _use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to run the forward pass in bf16."""
    if precision == "auto":
        return device.type == "cuda" and bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return precision == "bf16"
