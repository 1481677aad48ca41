# SPDX-License-Identifier: Apache-2.0
"""The dense part of a model in parts (FSDP2): of its parameters, gradients and optimizer state each process holds an N-th.

PyTorch's ``fully_shard`` does the work: it makes a ``DTensor`` of each parameter, split along its first dimension, gathers those of a
block before its forward and its backward pass and lets them go behind them, and averages the gradients as it splits them. What is ours is
which modules are gathered together (`blocks`), that tables are left to TorchRec, and what FSDP must be told so that a step is the same as
with a copy in each process.
"""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torchrec.distributed.model_parallel import DataParallelWrapper, DistributedModelParallel
from torchrec.distributed.types import ShardedModule, ShardingEnv

from recsys.core.errors import ConfigError

_CALLED = {"forward", "reset_parameters"}


class DenseParts:
    """A module whose dense parameters are in parts; it is changed in place.

    The parameters of the first process count, as in DistributedDataParallel. A parameter without a gradient in one process has one of zeros
    there, so that all reduce the same; so a parameter that no process used in a step has a gradient of zeros, where a copy in each process
    would have none (Adam goes on by its momentum, and weight decay acts).

    Args:
        root: its forward pass is that of a training step; a sharded collection of TorchRec in it keeps its parameters.
        device: of this process.

    Raises:
        ConfigError: a dense parameter is a scalar, which has no dimension to split.
    """

    def __init__(self, root: nn.Module, device: torch.device) -> None:
        tables = {p for module in root.modules() if isinstance(module, ShardedModule) for p in module.parameters()}
        for name, parameter in root.named_parameters():
            if parameter in tables:
                continue
            if parameter.ndim == 0:
                raise ConfigError(f"distribution.dense: {name} is a scalar, which cannot be sharded; expected 'replicated'")
            dist.broadcast(parameter.detach(), src=0)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        parts: list[FSDPModule] = []
        for block in blocks(root):
            parts.append(fully_shard(block, mesh=mesh))
            _hand_on(block)
        self.root = fully_shard(root, mesh=mesh, ignored_params=tables)
        self.root.set_reduce_scatter_unused_params(True)
        if device.type == "cpu":  # summed and then divided, as the gradients of copies are
            for part in (*parts, self.root):
                part.set_force_sum_reduction_for_comms(True)
        # Otherwise a block that is validated before the first step would take itself for the root.
        self.root._get_fsdp_state()._lazy_init()

    def begin_step(self) -> None:
        """Forget a forward pass that no backward pass followed, as of a step that was left out."""
        self.root.reset_iter_state()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While the model is used otherwise than by the root's forward pass: blocks are gathered when they are called, the rest at once.

        A collective call, and every process must call the same blocks.
        """
        self.root.reset_iter_state()
        self.root.unshard()
        try:
            yield
        finally:
            self.root.reshard()


class SplitDense(DataParallelWrapper):
    """How TorchRec's `DistributedModelParallel` treats what is not in tables: see `DenseParts`, which are there once it has wrapped."""

    parts: DenseParts

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        """See `DataParallelWrapper`."""
        self.parts = DenseParts(dmp._dmp_wrapped_module, device)


def blocks(root: nn.Module) -> list[nn.Module]:
    """The modules that are gathered each by itself: the members of every outermost ``nn.ModuleList`` of two or more blocks of one class.

    A block has modules and parameters of its own, and its class has no public method but ``forward``: FSDP gathers when a module is called,
    so that a layer of which other methods are used too (as those of the retrievers' transformers are) would be found in parts. Such layers
    are gathered with the root's parameters, once for a step; between steps they are in parts like all others.
    """
    uses = _uses(root)
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            members = list(child.children()) if isinstance(child, nn.ModuleList) else []
            if len(members) > 1 and len({type(member) for member in members}) == 1 and all(_apart(member, uses) for member in members):
                found.extend(members)
            elif not isinstance(child, ShardedModule):
                look(child)

    look(root)
    return found


def _uses(module: nn.Module) -> Counter[int]:
    """How often each parameter is in a module."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def _apart(module: nn.Module, uses: Mapping[int, int]) -> bool:
    """Whether a module is called and nothing else, and its parameters are in no other module."""
    own = _uses(module)
    return any(True for _ in module.children()) and bool(own) and own.items() <= dict(uses).items() and _methods(type(module)) <= _CALLED


def _methods(kind: type) -> set[str]:
    """The public methods of a class, without those of ``nn.Module``."""
    ours = (base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module)
    return {name for base in ours for name, value in vars(base).items() if inspect.isroutine(value) and not name.startswith("_")}


class _Wrapped:
    """A list where FSDP looks for tensors among a module's arguments."""

    def __init__(self, penalties: list[Tensor]) -> None:
        self.penalties = penalties


def _hand_on(block: nn.Module) -> None:
    """Let a block have the very list that it is to add penalties to: FSDP replaces a list that has tensors with gradients by another."""

    def hide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(_hidden(arg) for arg in args), {name: _hidden(arg) for name, arg in kwargs.items()}

    def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(_shown(arg) for arg in args), {name: _shown(arg) for name, arg in kwargs.items()}

    block.register_forward_pre_hook(hide, prepend=True, with_kwargs=True)
    block.register_forward_pre_hook(show, with_kwargs=True)


def _hidden(value: Any) -> Any:
    return _Wrapped(value) if isinstance(value, list) else value


def _shown(value: Any) -> Any:
    return value.penalties if isinstance(value, _Wrapped) else value
