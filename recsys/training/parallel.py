# SPDX-License-Identifier: Apache-2.0
"""How a model is trained: by one process as it is, or by several together, with tables in parts and one gradient for everything else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recsys.core.config import Config
from recsys.core.errors import CheckpointError, DataError
from recsys.data.world import World
from recsys.embedding.sharding import AVERAGING, Placement, holders, shard
from recsys.embedding.tables import EmbeddingTables
from recsys.training.checkpoint import Checkpoint, Checkpoints
from recsys.training.optim import DenseOptimizer, Optimizers
from recsys.training.randomness import random_state, set_random_state
from recsys.training.shards import INDEX, load_shards, shapes
from recsys.training.shared_checkpoint import SharedCheckpoints

_DENSE, _HELD, _RANDOM = "dense", "held", "random"


class Distribution(Config):
    """How tables are split where several processes train.

    Attributes:
        placements: of tables by name; the others go wherever TorchRec's planner estimates the lowest cost.
    """

    placements: dict[str, Placement] = Field(default_factory=dict)


class Trained(Protocol):
    """A model while it is trained."""

    world: World
    optimizers: Optimizers

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss of this process's share of a batch, and its parts; a `DataError` where a batch is not as it should be."""
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

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Trained`."""
        return cast(Any, self._model).loss(batch)  # type: ignore[no-any-return]

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
    process has a copy, whose gradients are averaged (DistributedDataParallel). Random numbers differ between the processes, dropout's
    among them, so that with dropout another number of processes is another course of the same training.

    Args:
        model: see `Alone`; equal in all processes.
        optimizer: see `Alone`.
        root: see `Alone`.
        keep: see `Alone`.
        identity: see `Alone`.
        distribution: of the tables.
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
        self._model, self._device = model, next((p.device for p in model.parameters()), torch.device("cpu"))
        self._wrapped = _wrapped(_Loss(model), distribution, self._device)
        self.optimizers = Optimizers(optimizer, model)
        self._checkpoints = SharedCheckpoints(root, keep, {**identity, "checkpoint": "of several processes"}, self.world)
        torch.manual_seed(torch.initial_seed() + self.world.rank)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Trained`."""
        self._look(batch)
        return self._wrapped(batch)  # type: ignore[no-any-return]

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
        for name in self.optimizers.dense_parameters:
            prefix = f"{_DENSE}.{name}."
            own = {key.removeprefix(prefix): about for key, about in saved.items() if key.startswith(prefix)}
            if own:
                state[name] = {key: torch.empty(shape, dtype=dtype, device=self._device) for key, (shape, dtype) in own.items()}
        return {_DENSE: state} if state else {}

    def _check(self, found: Checkpoint) -> None:
        if INDEX not in found.manifest.files:
            raise CheckpointError(f"{found.directory}: was written by one process alone; several go on from what several wrote")


class _Loss(nn.Module):
    """The loss as a forward pass, which is what DistributedDataParallel watches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return cast(Any, self.model).loss(batch)  # type: ignore[no-any-return]


def _wrapped(module: nn.Module, distribution: Distribution, device: torch.device) -> nn.Module:
    if any(isinstance(part, EmbeddingTables) for part in module.modules()):
        sharded: nn.Module = shard(module, constraints=distribution.placements, device=device)
        return sharded
    return DistributedDataParallel(module, broadcast_buffers=False, **cast(Any, AVERAGING))
