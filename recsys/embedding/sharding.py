# SPDX-License-Identifier: Apache-2.0
"""Embedding tables over several processes: TorchRec's planner and its `DistributedModelParallel`, on the CPU (gloo) too."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
import torch.distributed.optim  # DistributedDataParallel reads it without importing it
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import BaseEmbeddingSharder, EmbeddingComputeKernel
from torchrec.distributed.fused_embeddingbag import FusedEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DataParallelWrapper, DistributedModelParallel
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper as _Averaged
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ModuleSharder, ParameterSharding, ShardingEnv, ShardingPlan
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from recsys.core.errors import ConfigError, unknown
from recsys.data.world import World
from recsys.embedding.exchange import gathered
from recsys.embedding.tables import EmbeddingTables
from recsys.embedding.unpooled import UnpooledTables

Placement = Literal["table_wise", "row_wise"]
"""``table_wise``: one process holds the table. ``row_wise``: each process holds an equal range of its rows."""
AVERAGING = {"static_graph": False, "find_unused_parameters": True}
"""Of DistributedDataParallel: its buckets then stay as they are from the first step. Otherwise it orders them anew after one step, and with
them the sums, so that a run that goes on from a checkpoint would differ in the last digits from one that was never interrupted."""
_PLACEMENTS: tuple[str, ...] = ("table_wise", "row_wise")


class _Sharder(BaseEmbeddingSharder):
    """What both kinds of collection allow: never DATA_PARALLEL, whose tables the fused optimizer would silently not train."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        # TorchRec lists row-wise for GPUs alone, although it works over gloo.
        return list(_PLACEMENTS)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return [EmbeddingComputeKernel.FUSED.value]


class _PooledSharder(_Sharder, FusedEmbeddingBagCollectionSharder):
    """Shards the pooled tables."""

    def shard(self, module: Any, params: dict[str, ParameterSharding], env: ShardingEnv, *rest: Any, **named: Any) -> nn.Module:
        sharded: nn.Module = super().shard(module, params, env, *rest, **named)
        _copy_weights(module.state_dict(), sharded)
        return sharded


class _UnpooledSharder(_Sharder):
    """Shards the unpooled tables: TorchRec's sequence lookups need one width, so there is one sharded collection for each width."""

    @property
    def module_type(self) -> type[UnpooledTables]:
        return UnpooledTables

    def shardable_parameters(self, module: UnpooledTables) -> dict[str, nn.Parameter]:
        return {name.split(".")[-2]: parameter for name, parameter in module.named_parameters()}

    def shard(
        self,
        module: UnpooledTables,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> nn.Module:
        # Not TorchRec's ShardedFusedEmbeddingCollection: it misnames its parameters, which DistributedDataParallel then takes for its own.
        fused = module.fused_arguments()
        parts = {str(part.embedding_dim()): ShardedEmbeddingCollection(part, params, env, fused, device) for part in module.by_width()}
        for part in parts.values():
            _copy_weights(module.state_dict(), part)
        return next(iter(parts.values())) if len(parts) == 1 else _ByWidth(parts)


class _ByWidth(FusedOptimizerModule, nn.Module):
    """Sharded unpooled tables of several widths. Names in both state dicts, weights' and optimizer's, are those of tables of one width."""

    def __init__(self, parts: dict[str, ShardedEmbeddingCollection]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self._optimizer = CombinedOptimizer([("", part.fused_optimizer) for part in parts.values()])
        self.register_state_dict_post_hook(_ByWidth._shorten)
        self.register_load_state_dict_pre_hook(_ByWidth._lengthen)

    @property
    def fused_optimizer(self) -> KeyedOptimizer:
        """Those of all parts."""
        return self._optimizer

    @staticmethod
    def _shorten(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """``parts.16.embeddings.item.weight`` → ``embeddings.item.weight``."""
        for name in [name for name in state if name.startswith(f"{prefix}parts.")]:
            state[prefix + name.removeprefix(f"{prefix}parts.").split(".", 1)[1]] = state.pop(name)

    @staticmethod
    def _lengthen(module: "_ByWidth", state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """The reverse of `_shorten`."""
        for width, part in module.parts.items():
            for name in part.state_dict():
                if prefix + name in state:
                    state[f"{prefix}parts.{width}.{name}"] = state.pop(prefix + name)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """The vectors of every key."""
        found = [part(features) for part in self.parts.values()]  # all are under way before the first is waited for
        return {key: jagged for part in found for key, jagged in part.items()}


def _copy_weights(weights: Mapping[str, Tensor], sharded: nn.Module) -> None:
    """Copy into a sharded collection the part of each table that this process holds; nothing where the tables are on the meta device."""
    for name, tensor in sharded.state_dict().items():
        if name not in weights or weights[name].is_meta:
            continue
        for shard in tensor.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            shard.tensor.detach().copy_(weights[name][row : row + rows, column : column + columns])


def sharders() -> list[ModuleSharder]:
    """The sharders of both kinds of collection in `EmbeddingTables`."""
    return [_PooledSharder(), _UnpooledSharder()]


def plan(
    model: nn.Module, world: int, constraints: Mapping[str, Placement] | None = None, device: str = "cpu", local_world: int | None = None
) -> ShardingPlan:
    """Where each table of ``model`` goes: TorchRec's planner, which weighs bytes, communication and balance.

    The same arguments give the same plan in every process. Tables without a constraint go wherever the planner's estimate is lowest.

    Args:
        model: holds one or more `EmbeddingTables`, which may be on the meta device.
        world: the number of processes.
        constraints: the placement of tables by name.
        device: ``cpu`` or ``cuda``.
        local_world: the processes of one host; all of them by default.

    Raises:
        ConfigError: a constraint names a table that is not there, or a placement that fused tables do not have.
    """
    constraints = constraints or {}
    names = {t.name for module in model.modules() if isinstance(module, EmbeddingTables) for t in module.spec.tables}
    for table, placement in constraints.items():
        if table not in names:
            raise ConfigError(f"constraints: {unknown('table', table, names)}")
        if placement not in _PLACEMENTS:
            raise ConfigError(f"constraints.{table}: expected one of {', '.join(_PLACEMENTS)}, got {placement!r}")
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world, compute_device=device, local_world_size=local_world or world),
        constraints={table: ParameterConstraints(sharding_types=[placement]) for table, placement in constraints.items()},
    )
    return planner.plan(model, sharders())


def placements(plan: ShardingPlan) -> dict[str, str]:
    """The placement of each table in a plan."""
    return {table: sharding.sharding_type for module in plan.plan.values() for table, sharding in module.items()}


def shard(
    module: nn.Module,
    plan: ShardingPlan | None = None,
    constraints: Mapping[str, Placement] | None = None,
    device: torch.device | None = None,
    dense: DataParallelWrapper | None = None,
) -> DistributedModelParallel:
    """Split the tables of ``module`` over the processes of the default group, and average the gradients of everything else.

    ``module`` itself is changed: its tables become TorchRec's sharded collections with the weights that they had. Tables built under
    ``torch.device("meta")``, for sizes that one host cannot hold, are drawn anew here, each process its own part. Every process looks up
    its own batch. TorchRec divides the tables' gradients by the number of processes, so that the mean loss over each process's batch
    trains as the mean over all of them does.

    The optimizer's state of the tables begins anew; ``fused_optimizer.state_dict()`` of the result holds it from then on, and
    `torch.distributed.checkpoint` saves it together with ``state_dict()`` in a form that any number of processes can load. The dense
    optimizer takes `recsys.embedding.tables.dense_parameters`.

    Of the maps of managed ids each process keeps its buckets (`recsys.embedding.ids.ManagedIds.share`), wherever the rows are. They are
    not in ``state_dict()``: see `HoldsShards`.

    Args:
        module: holds one or more `EmbeddingTables`.
        plan: the result of `plan`, the same in every process; the planner's choice under ``constraints`` by default.
        constraints: see `plan`; not together with ``plan``.
        device: of this process, the CPU by default.
        dense: what is done with everything else; by default each process has a copy, in DistributedDataParallel.

    Raises:
        ConfigError: both a plan and constraints; or the number of processes does not divide that of a table's buckets.
    """
    if plan is not None and constraints:
        raise ConfigError("expected a plan or constraints, got both")
    tables = {name: m for name, m in module.named_modules() if isinstance(m, EmbeddingTables)}
    managed = [m.ids for m in tables.values() if m.config.managed]
    for ids in managed:
        ids.check_world(World.current())
    device = device or torch.device("cpu")
    plan = plan or _plan(module, dist.get_world_size(), constraints, device.type)
    for ids in managed:
        ids.share(World.current(), device)
    unborn = {name: m.config.init_std for name, m in tables.items() if any(weight.is_meta for weight in m.parameters())}
    dense = dense or _Averaged(**AVERAGING)
    model = DistributedModelParallel(module, device=device, plan=plan, sharders=sharders(), data_parallel_wrapper=dense)
    for name, std in unborn.items():
        _draw(model.module.get_submodule(name), std)
    return model


_plan = plan  # `shard` has an argument of that name


def _draw(tables: nn.Module, std: float) -> None:
    """Initial weights, of a stream of random numbers that differs between processes."""
    generator = torch.Generator().manual_seed(torch.initial_seed() + 1 + dist.get_rank())
    for tensor in tables.state_dict().values():
        for part in tensor.local_shards():
            part.tensor.detach().copy_(torch.randn(part.tensor.shape, generator=generator) * std)


@runtime_checkable
class HoldsShards(Protocol):
    """A module that holds a part of a state of which ``state_dict`` has nothing, since names and shapes differ between the processes."""

    def shard_state(self) -> dict[str, Tensor]:
        """This process's part; no name is in two processes. Empty where the module is not shared between processes."""
        ...

    def load_shard_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what all names of `shard_state` had in the processes that saved them, however many; there may be others beside them."""
        ...


def holders(model: nn.Module) -> dict[str, HoldsShards]:
    """The modules of ``model`` that hold such parts, by the names that they have in its state dict."""
    root = model.module if isinstance(model, DistributedModelParallel) else model
    return {name: module for name, module in root.named_modules() if isinstance(module, HoldsShards)}


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tables and parameters and all maps of managed ids, in every process, for the unsharded model to load.

    A collective call: every process makes it.

    Args:
        model: the result of `shard`, or what was given to it.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not hasattr(tensor, "local_shards"):
            state[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()
            continue
        parts = tensor.local_shards()
        whole = torch.zeros(tensor.size(), device=parts[0].tensor.device if parts else _device(model))
        for part in parts:
            (row, column), (rows, columns) = part.metadata.shard_offsets, part.metadata.shard_sizes
            whole[row : row + rows, column : column + columns] = part.tensor.detach()
        dist.all_reduce(whole)
        state[name] = whole
    for name, module in holders(model).items():
        state |= {f"{name}.{key}": tensor for key, tensor in gathered(module.shard_state(), _device(model)).items()}
    return state


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
