# SPDX-License-Identifier: Apache-2.0
"""A small model with fused tables and dropout, and its data: what the trainer's tests train."""

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.data.batch import RankingBatch
from recsys.data.loader import TableLoader
from recsys.data.spec import InputSpec, TableSpec
from recsys.embedding.tables import EmbeddingTables

SPEC = InputSpec(tables=(TableSpec(name="item", rows=30, bags=("item",)),), dense=("x",), tasks=("like",))


class Small(nn.Module):
    """Logistic regression's slightly deeper sister."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = EmbeddingTables(SPEC, EmbeddingTables.Config(dim=4, learning_rate=0.1))
        self.mlp = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, batch: RankingBatch) -> Tensor:
        return self.mlp(torch.cat([self.tables(batch).pooled["item"], batch.dense], dim=1))[:, 0]

    def loss(self, batch: RankingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        bce = nn.functional.binary_cross_entropy_with_logits(self(batch), batch.labels[:, 0])
        return bce, {"bce": bce.detach()}


def data(rows: int = 70, seed: int = 0) -> pa.Table:
    """Items, a dense column, and labels that depend on both."""
    rng = np.random.default_rng(seed)
    item, x = rng.integers(0, 30, rows), rng.normal(size=rows)
    label = (x + (item % 3) - 1 + rng.normal(size=rows) > 0).astype(float)
    return pa.table({"item": item, "x": x, "label": label})


def to_batch(table: pa.Table) -> RankingBatch:
    columns = {name: torch.tensor(table[name].to_numpy()) for name in table.column_names}
    ones = torch.ones(table.num_rows, dtype=torch.int32)
    return RankingBatch(
        sparse=KeyedJaggedTensor(keys=["item"], values=columns["item"], lengths=ones),
        sequences=KeyedJaggedTensor(keys=[], values=torch.zeros(0, dtype=torch.int64), lengths=torch.zeros(0, dtype=torch.int32)),
        dense=columns["x"][:, None].float(),
        labels=columns["label"][:, None].float(),
    )


def make_loader(prefetch: int = 0, batch_size: int = 16) -> TableLoader[RankingBatch]:
    return TableLoader(data(), to_batch, batch_size=batch_size, seed=3, prefetch=prefetch)


@torch.no_grad()
def validate(model: nn.Module) -> dict[str, float]:
    batch = to_batch(data(40, seed=1))
    loss = float(model.loss(batch)[0])
    return {"loss": loss, "distance": abs(loss - 0.68)}
