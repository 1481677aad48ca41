# SPDX-License-Identifier: Apache-2.0
"""The embedding tables of a ranker, built from an `InputSpec`, updated by FBGEMM inside the backward pass."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import CheckpointError, ConfigError, RecsysError, unknown
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec
from recsys.data.world import average
from recsys.embedding.ids import ManagedIds, ManagedTableConfig
from recsys.embedding.renewal import renew
from recsys.embedding.unpooled import UnpooledTables

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
LEARNING_RATE = "learning_rate"
Width = Annotated[int, Field(ge=4, multiple_of=4)]  # FBGEMM's rows are vectors of four


@dataclass(frozen=True)
class Embedded:
    """What the tables say about a batch of B rows.

    Attributes:
        pooled: for each key of ``spec.bag_keys``, in that order, float ``[B, width]``; 0 for an empty bag. ``pooled.values()`` is all of
            them, one after another.
        sequences: for each key of ``spec.sequence_keys``, in that order, the vectors ``[N, width]`` of all elements, and their lengths.
    """

    pooled: KeyedTensor
    sequences: dict[str, JaggedTensor]


def keyed(parts: Mapping[str, Tensor], rows: int, device: torch.device | None = None) -> KeyedTensor:
    """``[B, width]`` for each key, one after another; B is ``rows``, and ``device`` that of the result where there is no key."""
    values = torch.cat(list(parts.values()), dim=1) if parts else torch.empty(rows, 0, device=device)
    return KeyedTensor(list(parts), [part.shape[1] for part in parts.values()], values)


class EmbeddingTables(nn.Module):
    """All tables of an `InputSpec`, pooled and unpooled, in TorchRec's fused collections.

    The optimizer is part of the backward pass: every backward pass through the result updates the rows that it looked up, duplicates
    summed first, so gradients are never materialised (``parameter.grad`` stays None) and cannot be accumulated over several passes. A
    dense optimizer that is given these parameters leaves them alone; `dense_parameters` names the others. The parameters are
    ``pooled.embedding_bags.<table>.weight`` and ``unpooled.embeddings.<table>.weight``.

    The parameters are views of FBGEMM's memory. Save and load them through ``state_dict`` as usual, but choose the device when building.

    Args:
        spec: the tables and their keys.
        config: see `Config`.
        device: where the tables live, the CPU by default.

    Raises:
        ConfigError: a table has a name that a module cannot have; ``dims`` names a table that the spec does not have; ``managed`` does not
            name one of raw ids.

    Row-wise Adagrad (FBGEMM's EXACT_ROWWISE_ADAGRAD, `torchrec.optim.RowWiseAdagrad`) keeps one accumulator m per row, for the gradient
    g of the whole row: m ← m + mean(g²), w ← w − lr · g / (√m + eps). Rows that a batch does not look up do not change. There is no
    weight decay: FBGEMM's CPU kernels accept it and then ignore it for pooled tables.
    """

    class Config(BaseConfig):
        """How tables are sized, initialised and trained.

        Attributes:
            dim: the width of every table that ``dims`` does not name.
            dims: other widths, by table. A history's items and their target share a table, so they agree by themselves.
            managed: the tables whose keys hold raw 64-bit ids instead of rows, see `recsys.embedding.ids.ManagedIds`.
            pooling: of bags.
            optimizer: what FBGEMM can fuse on the CPU.
            learning_rate: the initial one; see `EmbeddingTables.set_learning_rate`.
            eps: added to the root of the accumulator of Adagrad.
            max_gradient: clips every component of the gradient of the looked-up (or pooled) vectors to ± this, before duplicates are
                summed.
            init_std: the initial weights are normal with mean 0, drawn from torch's generator.
            l2: λ, the weight of the looked-up vectors' squares in the loss of rankers, see `EmbeddingTables.penalty`. Against tables
                that know the training rows by heart after an epoch.
        """

        dim: Width = 32
        dims: dict[str, Width] = Field(default_factory=dict)
        managed: dict[str, ManagedTableConfig] = Field(default_factory=dict)
        pooling: Literal["sum", "mean"] = "sum"
        optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
        learning_rate: NonNegativeFloat = 0.05
        eps: PositiveFloat = 1e-8
        max_gradient: PositiveFloat | None = None
        init_std: NonNegativeFloat = 0.01
        l2: NonNegativeFloat = 0.0

        def dim_of(self, table: str) -> int:
            """The width of a table."""
            return self.dims.get(table, self.dim)

    def __init__(self, spec: InputSpec, config: Config, device: torch.device | None = None) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        if absent := [table for table in config.dims if table not in {t.name for t in spec.tables}]:
            raise ConfigError(f"embedding.dims: {unknown('table', absent[0], (t.name for t in spec.tables))}")
        if taken := [t.name for t in spec.tables if "." in t.name or hasattr(nn.ModuleDict, t.name)]:
            raise ConfigError(
                f"table {taken[0]!r}: expected a name without dots that torch.nn.ModuleDict does not use itself, such as {taken[0]}_id; "
                "a feature's `table` names it"
            )
        if unmanaged := [t.name for t in spec.tables if t.ids == "raw" and t.name not in config.managed]:
            raise ConfigError(f"embedding.managed: expected table {unmanaged[0]!r}, whose ids are raw, got {list(config.managed)}")
        self._device = device or torch.device("cpu")
        self.pooled = self._build_pooled()
        self.unpooled = self._build_unpooled()
        for weight in self.parameters():
            nn.init.normal_(weight, std=config.init_std)
        if config.managed:
            self.ids = ManagedIds(spec, config.managed, self._device)
        self._addresses = self._weight_addresses()
        self.register_load_state_dict_post_hook(lambda module, keys: module._check_addresses())

    def dim_of(self, table: str) -> int:
        """The width of a table."""
        return self.config.dim_of(table)

    @property
    def widths(self) -> dict[str, int]:
        """The width of each key's vectors, pooled keys first."""
        return key_widths(self.spec, self.config)

    def _build_pooled(self) -> FusedEmbeddingBagCollection | None:
        pooling = PoolingType.SUM if self.config.pooling == "sum" else PoolingType.MEAN
        tables = [
            EmbeddingBagConfig(
                name=t.name, embedding_dim=self.dim_of(t.name), num_embeddings=t.rows, feature_names=list(t.bags), pooling=pooling
            )
            for t in self.spec.tables
            if t.bags
        ]
        return FusedEmbeddingBagCollection(tables, *self._optimizer(), device=self._device) if tables else None

    def _build_unpooled(self) -> UnpooledTables | None:
        tables = [
            EmbeddingConfig(name=t.name, embedding_dim=self.dim_of(t.name), num_embeddings=t.rows, feature_names=list(t.sequences))
            for t in self.spec.tables
            if t.sequences
        ]
        return UnpooledTables(tables, *self._optimizer(), device=self._device) if tables else None

    def _optimizer(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        # FATAL, because FBGEMM's default mode reads row 0 in the place of a row that does not exist, and goes on.
        kwargs: dict[str, Any] = {"lr": self.config.learning_rate, "eps": self.config.eps, "bounds_check_mode": BoundsCheckMode.FATAL}
        if self.config.max_gradient is not None:
            kwargs |= {"gradient_clipping": True, "max_gradient": self.config.max_gradient}
        return _OPTIMIZERS[self.config.optimizer], kwargs

    def forward(self, batch: RankingBatch) -> Embedded:
        """Look up a batch.

        Raises:
            RuntimeError: a row is beyond its table (raised by FBGEMM).
        """
        if torch.is_inference_mode_enabled():
            # FBGEMM's fused lookups on the CPU exist as autograd kernels only, which inference mode leaves out.
            with torch.inference_mode(False), torch.no_grad():
                return self._look_up(batch)
        return self._look_up(batch)

    def _look_up(self, batch: RankingBatch) -> Embedded:
        if self.config.managed:
            batch, gone = self.ids(batch)
            if gone:
                renew(self._collections().values(), self.fused_optimizers(), gone, self.config.init_std)
        pooled = self.pooled(batch.sparse) if self.pooled is not None else keyed({}, len(batch), self._device)
        if tuple(pooled.keys()) != self.spec.bag_keys:  # a sharded collection orders its values by shard
            parts = pooled.to_dict()
            pooled = keyed({key: parts[key] for key in self.spec.bag_keys}, len(batch))
        unpooled = self.unpooled(batch.sequences) if self.unpooled is not None else {}
        return Embedded(pooled, {key: unpooled[key] for key in self.spec.sequence_keys})

    def penalty(self, embedded: Embedded) -> Tensor | None:
        """``λ / 2`` times the sum of the squares of all vectors that a batch of B rows looked up, divided by B; None where λ is 0.

        It shrinks the rows that a batch looks up (a bag as one vector), each as often as it is looked up. A decay of all rows at every step
        would undo what fused updates are for: that rows without a gradient are not touched.
        """
        if not self.config.l2:
            return None
        vectors = [embedded.pooled.values(), *(jagged.values() for jagged in embedded.sequences.values())]
        squares = torch.stack([v.float().square().sum() for v in vectors]).sum()
        return 0.5 * self.config.l2 * squares / average(squares.new_tensor(max(1, len(vectors[0]))))

    def fused_optimizers(self) -> list[KeyedOptimizer]:
        """The optimizers that run inside the backward pass.

        A changed ``param_groups[i]["lr"]`` reaches FBGEMM with the next ``step()`` (or ``zero_grad()``), which does nothing else.
        """
        return [optimizer for collection in self._collections().values() for optimizer in _optimizers(collection)]

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next backward pass."""
        groups = [group for optimizer in self.fused_optimizers() for group in optimizer.param_groups]
        return float(groups[0]["lr"]) if groups else self.config.learning_rate

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the following backward passes."""
        for optimizer in self.fused_optimizers():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()

    def fused_state(self) -> dict[str, Tensor]:
        """A copy of the optimizers' state: the accumulators, and the learning rate as a float64 scalar. The weights are not in it.

        Raises:
            CheckpointError: the tables are sharded; their state is saved by `torch.distributed.checkpoint`.
        """
        state = {name: tensor.detach().clone() for name, tensor in self._accumulators().items()}
        return state | {LEARNING_RATE: torch.tensor(self.learning_rate, dtype=torch.float64)}

    def load_fused_state(self, state: dict[str, Tensor]) -> None:
        """Load what `fused_state` gave.

        Raises:
            CheckpointError: other names or shapes than this module's: another spec, dimension or optimizer.
        """
        accumulators = self._accumulators()
        expected = {name: tuple(tensor.shape) for name, tensor in accumulators.items()} | {LEARNING_RATE: ()}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if given != expected:
            name = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))[0]
            raise CheckpointError(f"state of the embedding tables: {name!r}: expected {expected.get(name)}, got {given.get(name)}")
        for name, tensor in accumulators.items():
            tensor.copy_(state[name])
        self.set_learning_rate(float(state[LEARNING_RATE]))

    def _accumulators(self) -> dict[str, Tensor]:
        if self.sharded:
            raise CheckpointError("the state of sharded tables is that of DistributedModelParallel.fused_optimizer")
        return {
            f"{name}.{key}": tensor
            for name, collection in self._collections().items()
            for states in collection.fused_optimizer().state_dict()["state"].values()
            for key, tensor in states.items()
        }

    @property
    def sharded(self) -> bool:
        """Whether `recsys.embedding.sharding.shard` has replaced the collections."""
        return not all(isinstance(c, FusedEmbeddingBagCollection | UnpooledTables) for c in self._collections().values())

    def _collections(self) -> dict[str, Any]:
        return {name: module for name, module in (("pooled", self.pooled), ("unpooled", self.unpooled)) if module is not None}

    def _weight_addresses(self) -> list[int]:
        return [weight.data_ptr() for collection in self._collections().values() for weight in collection.parameters()]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Refuse a move or a cast."""
        super()._apply(fn, recurse)
        self._check_addresses()
        return self

    def _check_addresses(self) -> None:
        """Whatever replaces a parameter replaces it by a copy that FBGEMM neither reads nor trains."""
        if not self.sharded and self._weight_addresses() != self._addresses:
            raise RecsysError(
                f"embedding tables cannot be moved, cast or assigned to: FBGEMM holds their memory on {self._device}. "
                "Build them with device=..., load them with assign=False"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "EmbeddingTables":
        with torch.random.fork_rng(devices=[]):
            other = EmbeddingTables(self.spec, self.config, self._device)
        memo[id(self)] = other
        other.load_state_dict(self.state_dict())
        other.load_fused_state(self.fused_state())
        return other.train(self.training)


def _optimizers(collection: nn.Module) -> list[KeyedOptimizer]:
    """The fused optimizers of a collection; TorchRec's sharded ones have a property where the others have a method."""
    if not isinstance(collection, FusedOptimizerModule):
        return [optimizer for child in collection.children() for optimizer in _optimizers(child)]
    optimizer: Any = collection.fused_optimizer
    return [optimizer if isinstance(optimizer, KeyedOptimizer) else optimizer()]


def key_widths(spec: InputSpec, config: "EmbeddingTables.Config") -> dict[str, int]:
    """The width of each key's vectors, pooled keys first."""
    pooled = {key: config.dim_of(table.name) for table in spec.tables for key in table.bags}
    return pooled | {key: config.dim_of(table.name) for table in spec.tables for key in table.sequences}


def dense_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of ``model`` that no fused optimizer updates: those for a dense optimizer."""
    # DistributedModelParallel calls itself a FusedOptimizerModule, though it holds dense parameters too.
    modules = [m for m in model.modules() if isinstance(m, FusedOptimizerModule) and not isinstance(m, DistributedModelParallel)]
    fused = {id(parameter) for module in modules for parameter in module.parameters()}
    return (parameter for parameter in model.parameters() if id(parameter) not in fused)
