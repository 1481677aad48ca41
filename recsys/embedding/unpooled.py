# SPDX-License-Identifier: Apache-2.0
"""Unpooled embedding tables with a fused optimizer, of one width or several, on the CPU too."""

from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollectionInterface, get_embedding_names_by_table
from torchrec.modules.fused_embedding_modules import EmbeddingFusedOptimizer, convert_optimizer_type_and_kwargs
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor


class UnpooledTables(EmbeddingCollectionInterface, FusedOptimizerModule):
    """TorchRec's ``FusedEmbeddingCollection`` with the same parameter names, for the CPU too, and for tables of several widths.

    TorchRec 1.8 asserts a GPU and one width in its constructor, although FBGEMM trains unpooled tables on the CPU. One unpooled lookup
    of FBGEMM needs tables of one width; so there is one for each width.

    Args:
        tables: no key is in two of them.
        optimizer_type: ``torch.optim.SGD``, ``torch.optim.Adagrad`` or ``torchrec.optim.RowWiseAdagrad``.
        optimizer_kwargs: arguments of FBGEMM's `SplitTableBatchedEmbeddingBagsCodegen`.
        device: the CPU by default.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingConfig],
        optimizer_type: type[torch.optim.Optimizer],
        optimizer_kwargs: dict[str, Any],
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._tables, self._device = list(tables), device or torch.device("cpu")
        self._optimizer_type, self._optimizer_kwargs = optimizer_type, optimizer_kwargs
        if convert_optimizer_type_and_kwargs(optimizer_type, optimizer_kwargs) is None:
            raise ValueError(f"FBGEMM does not fuse {optimizer_type.__name__}")
        self._groups = [[t for t in self._tables if t.embedding_dim == dim] for dim in dict.fromkeys(t.embedding_dim for t in self._tables)]
        # In a list, so that their flat weights are not parameters beside those below, which are views of them.
        self._lookups = [self._lookup(group) for group in self._groups]
        optimizers = [EmbeddingFusedOptimizer(group, lookup) for group, lookup in zip(self._groups, self._lookups, strict=True)]
        self._optimizer: KeyedOptimizer = optimizers[0] if len(optimizers) == 1 else CombinedOptimizer([("", o) for o in optimizers])
        weights = {
            table.name: weight
            for group, lookup in zip(self._groups, self._lookups, strict=True)
            for table, weight in zip(group, lookup.split_embedding_weights(), strict=True)
        }
        self.embeddings = nn.ModuleDict()
        for table in self._tables:
            self.embeddings[table.name] = nn.Module()
            self.embeddings[table.name].register_parameter("weight", nn.Parameter(weights[table.name]))

    def _lookup(self, group: list[EmbeddingConfig]) -> SplitTableBatchedEmbeddingBagsCodegen:
        on_gpu = self._device.type == "cuda"
        place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if on_gpu else (EmbeddingLocation.HOST, ComputeDevice.CPU)
        return SplitTableBatchedEmbeddingBagsCodegen(
            [(table.num_embeddings, table.embedding_dim, *place) for table in group],
            feature_table_map=[i for i, table in enumerate(group) for _ in table.feature_names],
            pooling_mode=PoolingMode.NONE,
            device=self._device,
            **self.fused_arguments(),
        )

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """The looked-up rows, float ``[N_key, width]`` for each key."""
        jagged = features.to_dict()
        found: dict[str, JaggedTensor] = {}
        for group, lookup in zip(self._groups, self._lookups, strict=True):
            keys = [key for table in group for key in table.feature_names]
            values = torch.cat([jagged[key].values() for key in keys])
            lengths = torch.cat([jagged[key].lengths() for key in keys])
            offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.long())
            rows = lookup(values, offsets).split([jagged[key].values().numel() for key in keys])
            found |= {key: JaggedTensor(values=part, lengths=jagged[key].lengths()) for key, part in zip(keys, rows, strict=True)}
        return found

    def by_width(self) -> list["UnpooledTables"]:
        """Collections of one width each, which hold copies of the weights; this one where there is only one width."""
        if len(self._groups) == 1:
            return [self]
        parts = [UnpooledTables(group, self._optimizer_type, self._optimizer_kwargs, self._device) for group in self._groups]
        for part in parts:
            part.load_state_dict({name: self.state_dict()[name] for name in part.state_dict()})
        return parts

    def fused_optimizer(self) -> KeyedOptimizer:
        """The optimizer that runs inside the backward pass."""
        return self._optimizer

    @property
    def device(self) -> torch.device:
        """Where the tables live."""
        return self._device

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The tables."""
        return self._tables

    def need_indices(self) -> bool:
        """False: the result holds no indices."""
        return False

    def embedding_dim(self) -> int:
        """The width of the first table; of every table where they agree."""
        return int(self._tables[0].embedding_dim)

    def embedding_names_by_table(self) -> list[list[str]]:
        """The keys of each table."""
        return list(get_embedding_names_by_table(self._tables))

    def fused_arguments(self) -> dict[str, Any]:
        """The optimizer and its arguments, as FBGEMM names them."""
        optimizer, kwargs = convert_optimizer_type_and_kwargs(self._optimizer_type, self._optimizer_kwargs)
        return {"optimizer": optimizer, **kwargs}

    def use_gather_select(self) -> bool:
        """False: TorchRec's default."""
        return False

    def use_gather_select_per_sharding(self) -> None:
        """None: TorchRec's default."""
