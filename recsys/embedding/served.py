# SPDX-License-Identifier: Apache-2.0
"""Embedding tables that are only read: plain tensors, which may be mapped from a file and shared by several processes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.sparse.jagged_tensor import JaggedTensor

from recsys.core.errors import RecsysError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec
from recsys.embedding.tables import Embedded, EmbeddingTables, key_widths, keyed

_read_only: ContextVar[bool] = ContextVar("recsys_read_only_tables", default=False)


@contextmanager
def read_only_tables() -> Iterator[None]:
    """Rankers that are built inside have `ServedTables` without memory, until a state is loaded with ``assign=True``."""
    token = _read_only.set(True)
    try:
        yield
    finally:
        _read_only.reset(token)


def new_tables(spec: InputSpec, config: EmbeddingTables.Config, device: torch.device) -> EmbeddingTables:
    """The tables of a ranker that is being built: to be trained, or inside `read_only_tables` the ones that stand for them."""
    if not _read_only.get():
        return EmbeddingTables(spec, config, device)
    return cast(EmbeddingTables, ServedTables(spec, config))


class ServedTables(nn.Module):
    """`EmbeddingTables` for inference on the CPU: the same state dict and the same batch in, the same `Embedded` out, without gradients.

    FBGEMM's tables are views of memory that it has allocated, so each process has its own. These have none of their own: a state is loaded
    with ``assign=True``, and its tensors are the tables.

    Args:
        spec: the tables and their keys.
        config: of the `EmbeddingTables` that this stands for.

    Raises:
        RecsysError: a table has managed ids.
    """

    sharded = False

    def __init__(self, spec: InputSpec, config: EmbeddingTables.Config) -> None:
        super().__init__()
        if config.managed:
            raise RecsysError(f"embedding.managed: expected none in tables that are only read, got {list(config.managed)}")
        self.spec, self.config = spec, config
        self.pooled, self.unpooled = nn.Module(), nn.Module()
        self.pooled.embedding_bags = self._weights(table.name for table in spec.tables if table.bags)
        self.unpooled.embeddings = self._weights(table.name for table in spec.tables if table.sequences)

    def _weights(self, names: Iterable[str]) -> nn.ModuleDict:
        shapes = {table.name: (table.rows, self.config.dim_of(table.name)) for table in self.spec.tables}
        held = {name: nn.Module() for name in names}
        for name, module in held.items():
            module.weight = nn.Parameter(torch.empty(shapes[name], device="meta"), requires_grad=False)
        return nn.ModuleDict(held)

    @property
    def widths(self) -> dict[str, int]:
        """See `EmbeddingTables.widths`."""
        return key_widths(self.spec, self.config)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: RankingBatch) -> Embedded:
        """Look up a batch.

        Raises:
            RuntimeError, IndexError: a row is beyond its table.
        """
        bags = batch.sparse.to_dict() if self.spec.bag_keys else {}
        elements = batch.sequences.to_dict() if self.spec.sequence_keys else {}
        pooled: dict[str, Tensor] = {}
        sequences: dict[str, JaggedTensor] = {}
        for table in self.spec.tables:
            pooled |= {key: self._pool(table.name, bags[key]) for key in table.bags}
            sequences |= {key: self._look_up(table.name, elements[key]) for key in table.sequences}
        return Embedded(keyed(pooled, len(batch)), sequences)

    def _pool(self, table: str, bags: JaggedTensor) -> Tensor:
        offsets: Tensor = torch.ops.fbgemm.asynchronous_complete_cumsum(bags.lengths().long())
        weight = self.get_parameter(f"pooled.embedding_bags.{table}.weight")
        return functional.embedding_bag(bags.values(), weight, offsets, mode=self.config.pooling, include_last_offset=True)

    def _look_up(self, table: str, elements: JaggedTensor) -> JaggedTensor:
        weight = self.get_parameter(f"unpooled.embeddings.{table}.weight")
        return JaggedTensor(values=functional.embedding(elements.values(), weight), lengths=elements.lengths())
