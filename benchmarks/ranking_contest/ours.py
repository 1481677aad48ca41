# SPDX-License-Identifier: Apache-2.0
"""TokenMixer-Large of about the peers' dense size: 8 tokens of width 64, two blocks; tables of width 16 with fused row-wise Adagrad."""

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.ranking_contest.contest import Contestant
from benchmarks.ranking_contest.data import DENSE, FIELDS, ROWS, Rows
from benchmarks.worker import serve
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec, TableSpec
from recsys.embedding.tables import EmbeddingTables, dense_parameters
from recsys.ranking.models.tokenmixer_large import TokenMixerLarge
from recsys.ranking.tokenizers import GroupTokenizer

CATEGORICAL = tuple(f"c{i}" for i in range(FIELDS))
NUMERIC = tuple(f"d{i}" for i in range(DENSE))
_EMPTY = KeyedJaggedTensor(keys=[], values=torch.empty(0, dtype=torch.int64), lengths=torch.empty(0, dtype=torch.int32))


def build() -> TokenMixerLarge:
    """The model; fields go to tokens in their order, the dense columns to one of their own."""
    spec = InputSpec(tables=tuple(TableSpec(name=name, rows=ROWS, bags=(name,)) for name in CATEGORICAL), dense=NUMERIC, tasks=("click",))
    groups = {f"token{i}": tuple(part) for i, part in enumerate(np.array_split(CATEGORICAL, 6))} | {"numeric": NUMERIC}
    embedding = EmbeddingTables.Config(dim=16, optimizer="rowwise_adagrad", learning_rate=0.05)
    config = TokenMixerLarge.Config(tokenizer=GroupTokenizer.Config(groups=groups), dim=64, blocks=2, auxiliary=None, embedding=embedding)
    return TokenMixerLarge(config, spec)


def contestant() -> Contestant:
    """The model with Adam for what is dense."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.Adam(dense_parameters(model), lr=1e-3)

    def prepare(rows: Rows) -> RankingBatch:
        values = torch.from_numpy(np.ascontiguousarray(rows.categorical.T)).flatten()
        lengths = torch.ones(len(values), dtype=torch.int32)
        sparse = KeyedJaggedTensor(keys=list(CATEGORICAL), values=values, lengths=lengths)
        return RankingBatch(sparse, _EMPTY, torch.from_numpy(rows.dense), torch.from_numpy(rows.labels)[:, None])

    def step(batch: RankingBatch) -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss, _ = model.loss(batch)
        loss.backward()
        optimizer.step()

    def predict(batch: RankingBatch) -> np.ndarray:
        model.eval()
        return np.asarray(model.predict(batch)[:, 0])

    return Contestant(prepare, step, predict)


if __name__ == "__main__":
    serve(contestant().handle)
