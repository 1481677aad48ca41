# SPDX-License-Identifier: Apache-2.0
"""Unpooled embedding tables with a fused optimizer, on the CPU."""

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
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor


class CPUFusedEmbeddingCollection(EmbeddingCollectionInterface, FusedOptimizerModule):
    """TorchRec's ``FusedEmbeddingCollection`` for the CPU, with the same parameter names.

    TorchRec 1.8 asserts a GPU in its constructor, although FBGEMM trains unpooled tables on the CPU too.

    Args:
        tables: of one dimension; no key is in two of them.
        optimizer_type: ``torch.optim.SGD``, ``torch.optim.Adagrad`` or ``torchrec.optim.RowWiseAdagrad``.
        optimizer_kwargs: arguments of FBGEMM's `SplitTableBatchedEmbeddingBagsCodegen`.
    """

    def __init__(
        self, tables: Sequence[EmbeddingConfig], optimizer_type: type[torch.optim.Optimizer], optimizer_kwargs: dict[str, Any]
    ) -> None:
        super().__init__()
        self._tables = list(tables)
        fused = convert_optimizer_type_and_kwargs(optimizer_type, optimizer_kwargs)
        if fused is None:
            raise ValueError(f"FBGEMM does not fuse {optimizer_type.__name__}")
        lookup = SplitTableBatchedEmbeddingBagsCodegen(
            [(t.num_embeddings, t.embedding_dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for t in self._tables],
            feature_table_map=[i for i, table in enumerate(self._tables) for _ in table.feature_names],
            pooling_mode=PoolingMode.NONE,
            optimizer=fused[0],
            **fused[1],
        )
        # In a list, so that its flat weights are not parameters beside those below, which are views of them.
        self._lookup = [lookup]
        self._optimizer = EmbeddingFusedOptimizer(self._tables, lookup)
        self.embeddings = nn.ModuleDict()
        for table, weight in zip(self._tables, lookup.split_embedding_weights(), strict=True):
            self.embeddings[table.name] = nn.Module()
            self.embeddings[table.name].register_parameter("weight", nn.Parameter(weight))

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """The looked-up rows, float ``[N_key, dim]`` for each key."""
        jagged = features.to_dict()
        keys = [key for table in self._tables for key in table.feature_names]
        values = torch.cat([jagged[key].values() for key in keys])
        lengths = torch.cat([jagged[key].lengths() for key in keys])
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.long())
        rows = self._lookup[0](values, offsets).split([jagged[key].values().numel() for key in keys])
        return {key: JaggedTensor(values=part, lengths=jagged[key].lengths()) for key, part in zip(keys, rows, strict=True)}

    def fused_optimizer(self) -> KeyedOptimizer:
        """The optimizer that runs inside the backward pass."""
        return self._optimizer

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The tables."""
        return self._tables

    def need_indices(self) -> bool:
        """False: the result holds no indices."""
        return False

    def embedding_dim(self) -> int:
        """The dimension of every table."""
        return int(self._tables[0].embedding_dim)

    def embedding_names_by_table(self) -> list[list[str]]:
        """The keys of each table."""
        return list(get_embedding_names_by_table(self._tables))
