# SPDX-License-Identifier: Apache-2.0
"""How a model is trained: by one process as it is, or by several together, with tables in parts and one gradient for everything else."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from recsys.core.config import Config
from recsys.core.errors import CheckpointError, ConfigError, DataError
from recsys.data.loader import Loader
from recsys.data.world import World
from recsys.embedding.sharding import AVERAGING, Placement, holders, shard
from recsys.embedding.tables import EmbeddingTables
from recsys.training.checkpoint import Checkpoint, Checkpoints
from recsys.training.feed import Feed
from recsys.training.fully_sharded import DenseParts, SplitDense
from recsys.training.optim import DenseOptimizer, Optimizers
from recsys.training.pipelined import Ahead
from recsys.training.randomness import random_state, set_random_state
from recsys.training.shards import INDEX, load_shards, shapes
from recsys.training.shared_checkpoint import SharedCheckpoints

_DENSE, _HELD, _RANDOM = "dense", "held", "random"


class Distribution(Config):
    """How a model is split where several processes train. It decides no result, and may change between two parts of a run.

    Attributes:
        placements: of tables by name; the others go wherever TorchRec's planner estimates the lowest cost.
        dense: everything else is ``replicated``, a copy in each process (DistributedDataParallel), or ``sharded``: of parameters, gradients
            and optimizer state each process holds an N-th (FSDP2, see `recsys.training.fully_sharded`).
        pipelined: whether the next batch is copied to the device, and its ids go to the processes that hold their rows, while one is
            trained (see `recsys.training.pipelined`). ``auto``: with tables, on a GPU, in several processes. Managed ids cannot be asked
            for ahead, since rows change hands with every batch.
    """

    placements: dict[str, Placement] = Field(default_factory=dict)
    dense: Literal["replicated", "sharded"] = "replicated"
    pipelined: Literal["auto", "on", "off"] = "auto"


class Trained(Protocol):
    """A model while it is trained."""

    world: World
    optimizers: Optimizers

    def feed(self, loader: Loader[Any]) -> Feed:
        """What is left of the loader's epoch. `loss` takes its batches, one after another."""
        ...

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss of this process's share of a batch, and its parts; a `DataError` where a batch is not as it should be."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """While the model is used otherwise than by `loss`, without gradients."""
        ...

    def settle(self, values: Mapping[str, float], flags: Sequence[bool]) -> tuple[dict[str, float], list[bool]]:
        """The means of a step's values over all processes (not finite where one is not), and which flags are up in any of them."""
        ...

    def agree(self, values: Mapping[str, float]) -> dict[str, float]:
        """What the first process measured."""
        ...

    def load(self, found: Checkpoint) -> None:
        """Take weights, optimizers and random generators."""
        ...

    def load_weights(self, found: Checkpoint) -> None:
        """Take the weights alone."""
        ...

    def save(self, step: int, state: Mapping[str, Any], best: int | None) -> Path:
        """Write a checkpoint of all that, and of ``state``."""
        ...

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint to go on from."""
        ...

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step."""
        ...

    def wait(self) -> None:
        """Until what was to be saved is."""
        ...


class Alone:
    """A model that one process trains as it is.

    Args:
        model: see `recsys.training.trainer.Trainer.fit`.
        optimizer: of its dense parameters.
        root: of the checkpoints.
        keep: how many stay.
        identity: what decides the run's course.
    """

    def __init__(self, model: nn.Module, optimizer: DenseOptimizer, root: Path, keep: int, identity: Mapping[str, Any]) -> None:
        self.world = World()
        self.optimizers = Optimizers(optimizer, model)
        self._model, self._checkpoints = model, Checkpoints(root, keep, identity)

    def feed(self, loader: Loader[Any]) -> Feed:
        """See `Trained`."""
        return Feed(loader, _device(self._model))

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Trained`."""
        return cast(Any, self._model).loss(batch)  # type: ignore[no-any-return]

    def whole(self) -> AbstractContextManager[None]:
        """See `Trained`."""
        return nullcontext()

    def settle(self, values: Mapping[str, float], flags: Sequence[bool]) -> tuple[dict[str, float], list[bool]]:
        """See `Trained`."""
        return dict(values), list(flags)

    def agree(self, values: Mapping[str, float]) -> dict[str, float]:
        """See `Trained`."""
        return dict(values)

    def load(self, found: Checkpoint) -> None:
        """See `Trained`."""
        self.load_weights(found)
        self.optimizers.load_state_dict(found.read("optimizers"))
        set_random_state(found.read(_RANDOM))

    def load_weights(self, found: Checkpoint) -> None:
        """See `Trained`."""
        self._model.load_state_dict(found.read("model"))

    def save(self, step: int, state: Mapping[str, Any], best: int | None) -> Path:
        """See `Trained`."""
        own = {"model": self._model.state_dict(), "optimizers": self.optimizers.state_dict(), _RANDOM: random_state()}
        return self._checkpoints.save(step, own | dict(state), best)

    def latest(self) -> Checkpoint | None:
        """See `Trained`."""
        return self._checkpoints.latest()

    def at(self, step: int) -> Checkpoint:
        """See `Trained`."""
        return self._checkpoints.at(step)

    def wait(self) -> None:
        """See `Trained`."""


class Together:
    """A model that all processes of torch's default group train, each on its share of every batch.

    Its tables are split by TorchRec (`recsys.embedding.sharding.shard`), which changes the model in place; of everything else each
    process has a copy, whose gradients are averaged (DistributedDataParallel), or a part (FSDP2), as ``distribution`` says. Random numbers
    differ between the processes, dropout's among them, so that with dropout another number of processes is another course of the same
    training.

    Args:
        model: see `Alone`; equal in all processes.
        optimizer: see `Alone`.
        root: see `Alone`.
        keep: see `Alone`.
        identity: see `Alone`.
        distribution: of tables and everything else.

    Raises:
        ConfigError: the distribution does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: DenseOptimizer,
        root: Path,
        keep: int,
        identity: Mapping[str, Any],
        distribution: Distribution,
    ) -> None:
        self.world = World.current()
        self._model, self._device = model, _device(model)
        self._pipelined = _pipelined(distribution, model, self._device, self.world)
        self._ahead: Ahead | None = None
        self._wrapped, self._parts = _wrapped(_Loss(model), distribution, self._device)
        self.optimizers = Optimizers(optimizer, model)
        self._checkpoints = SharedCheckpoints(root, keep, {**identity, "checkpoint": "of several processes"}, self.world)
        torch.manual_seed(torch.initial_seed() + self.world.rank)

    def feed(self, loader: Loader[Any]) -> Feed:
        """See `Trained`."""
        if not self._pipelined:
            return Feed(loader, self._device)
        self._ahead = Ahead(loader, self._model, self._device, self._look)
        return self._ahead

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Trained`."""
        if self._parts is not None:
            self._parts.begin_step()
        if self._ahead is None:
            self._look(batch)
        with self._ahead.around() if self._ahead is not None else nullcontext():
            return self._wrapped(batch)  # type: ignore[no-any-return]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See `Trained`; a collective call."""
        with self._parts.whole() if self._parts is not None else nullcontext():
            yield

    def _look(self, batch: Any) -> None:
        """Whether any process has a batch that is not as it should be: before look-ups, for which all wait for each other.

        Raises:
            DataError: in all processes; names what is wrong in the one that has it.
        """
        diagnose = getattr(self._model, "diagnose", None)
        why: str | None = None if diagnose is None else diagnose(batch)
        bad = torch.tensor(float(why is not None))
        dist.all_reduce(bad)
        if bad:
            raise DataError(why or "the batch of another process is not as it should be")

    def settle(self, values: Mapping[str, float], flags: Sequence[bool]) -> tuple[dict[str, float], list[bool]]:
        """See `Trained`."""
        told = torch.tensor([*values.values(), *map(float, flags)], dtype=torch.float64)
        dist.all_reduce(told)
        means = (told / self.world.size).tolist()
        return dict(zip(values, means, strict=False)), [mean > 0 for mean in means[len(values) :]]

    def agree(self, values: Mapping[str, float]) -> dict[str, float]:
        """See `Trained`."""
        told = [dict(values)]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def load(self, found: Checkpoint) -> None:
        """See `Trained`."""
        self._check(found)
        state = {"fused": self._fused()} | self._dense_as_saved(found)
        self._load_model(found, state)
        self.optimizers.load_dense(state.get(_DENSE, {}))
        own = f"{_RANDOM}-{self.world.rank}"
        if own in found:
            set_random_state(found.read(own))
        else:  # one more process than wrote it
            torch.manual_seed(torch.initial_seed() + found.manifest.step)

    def load_weights(self, found: Checkpoint) -> None:
        """See `Trained`."""
        self._check(found)
        self._load_model(found, {})

    def _load_model(self, found: Checkpoint, state: dict[str, Any]) -> None:
        """Take the weights, and fill the rest of ``state``."""
        state |= {"model": self._model.state_dict()} | self._held_as_saved(found)
        load_shards(found.directory, state)
        self._model.load_state_dict(state["model"])
        for name, held in state.get(_HELD, {}).items():
            holders(self._model)[name].load_shard_state(held)

    def save(self, step: int, state: Mapping[str, Any], best: int | None) -> Path:
        """See `Trained`."""
        shards = {"model": self._model.state_dict(), "fused": self._fused(), _DENSE: self.optimizers.dense_state()} | self._held()
        return self._checkpoints.save(step, state, {_RANDOM: random_state()}, shards, best)

    def latest(self) -> Checkpoint | None:
        """See `Trained`."""
        return self._checkpoints.latest()

    def at(self, step: int) -> Checkpoint:
        """See `Trained`."""
        return self._checkpoints.at(step)

    def wait(self) -> None:
        """See `Trained`."""
        self._checkpoints.wait()

    def _fused(self) -> dict[str, Any]:
        """The state of the tables' optimizers, in parts; loading fills it in place."""
        optimizer = getattr(self._wrapped, "fused_optimizer", None)
        return {} if optimizer is None else optimizer.state_dict()["state"]

    def _held(self) -> dict[str, Any]:
        """What modules hold in parts besides, such as maps of managed ids."""
        held = {name: module.shard_state() for name, module in holders(self._model).items()}
        return {_HELD: held} if any(held.values()) else {}

    def _held_as_saved(self, found: Checkpoint) -> dict[str, Any]:
        """Empty tensors for that: some are as long as they were when they were saved."""
        saved, state = shapes(found.directory), self._held()
        for name, held in state.get(_HELD, {}).items():
            for key, tensor in held.items():
                shape, dtype = saved.get(f"{_HELD}.{name}.{key}", (tuple(tensor.shape), tensor.dtype))
                held[key] = torch.empty(shape, dtype=dtype, device=tensor.device)
        return state

    def _dense_as_saved(self, found: Checkpoint) -> dict[str, Any]:
        """Empty tensors for the dense optimizer's state, which it has not before its first step."""
        saved = shapes(found.directory)
        state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.optimizers.dense_parameters.items():
            prefix = f"{_DENSE}.{name}."
            own = {key.removeprefix(prefix): about for key, about in saved.items() if key.startswith(prefix)}
            if own:
                state[name] = {key: _empty(shape, dtype, parameter) for key, (shape, dtype) in own.items()}
        return {_DENSE: state} if state else {}

    def _check(self, found: Checkpoint) -> None:
        if INDEX not in found.manifest.files:
            raise CheckpointError(f"{found.directory}: was written by one process alone; several go on from what several wrote")


class _Loss(nn.Module):
    """The loss as a forward pass, which is what DistributedDataParallel and FSDP watch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return cast(Any, self.model).loss(batch)  # type: ignore[no-any-return]


def _wrapped(module: nn.Module, distribution: Distribution, device: torch.device) -> tuple[nn.Module, DenseParts | None]:
    """The module as all processes train it, and its dense parameters where they are in parts."""
    with_tables = bool(_tables(module))
    if distribution.dense == "sharded":
        if not with_tables:
            return module, DenseParts(module, device)
        split = SplitDense()
        return shard(module, constraints=distribution.placements, device=device, dense=split), split.parts
    if with_tables:
        return shard(module, constraints=distribution.placements, device=device), None
    return DistributedDataParallel(module, broadcast_buffers=False, **cast(Any, AVERAGING)), None


def _pipelined(distribution: Distribution, model: nn.Module, device: torch.device, world: World) -> bool:
    """Whether look-ups begin ahead.

    Raises:
        ConfigError: they are to, and cannot.
    """
    tables = _tables(model)
    managed = [name for one in tables for name in one.config.managed]
    if distribution.pipelined == "on" and (not tables or managed):
        why = f"the ids of table {managed[0]!r} are managed" if managed else "the model has no tables"
        raise ConfigError(f"distribution.pipelined: expected 'auto' or 'off', got 'on': {why}")
    able = bool(tables) and not managed
    return able and (distribution.pipelined == "on" or (distribution.pipelined == "auto" and device.type == "cuda" and world.size > 1))


def _tables(module: nn.Module) -> list[EmbeddingTables]:
    return [part for part in module.modules() if isinstance(part, EmbeddingTables)]


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _empty(shape: tuple[int, ...], dtype: torch.dtype, parameter: Tensor) -> Tensor:
    """A tensor for a parameter's state, in parts as the parameter is."""
    if isinstance(parameter, DTensor) and shape == tuple(parameter.shape):
        return torch.empty_like(parameter.detach(), dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=parameter.device)
