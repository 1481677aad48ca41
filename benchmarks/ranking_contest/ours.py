# SPDX-License-Identifier: Apache-2.0
"""Our rankers over tables of width 16 with fused row-wise Adagrad; Adam, fused, for what is dense.

``tokenmixer_large``: 8 tokens of width 64, two blocks. ``dcnv2`` and ``dlrm``: the sizes that the peers have. A name that ends in
``_compiled`` compiles the dense part.
"""

import sys

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.ranking_contest.contest import Contestant
from benchmarks.ranking_contest.data import DENSE, FIELDS, ROWS, Rows
from benchmarks.ranking_contest.sizes import DCNV2, DLRM
from benchmarks.worker import serve
from recsys.core import components
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec, TableSpec
from recsys.embedding.tables import dense_parameters
from recsys.ranking.model import Ranker
from recsys.training.optim import DenseOptimizer

CATEGORICAL = tuple(f"c{i}" for i in range(FIELDS))
NUMERIC = tuple(f"d{i}" for i in range(DENSE))
_EMPTY = KeyedJaggedTensor(keys=[], values=torch.empty(0, dtype=torch.int64), lengths=torch.empty(0, dtype=torch.int32))
_TABLES = {"dim": DLRM.embedding, "optimizer": "rowwise_adagrad", "learning_rate": DLRM.table_rate, "init_std": DLRM.init_std}
_GROUPS = {f"token{i}": tuple(part) for i, part in enumerate(np.array_split(CATEGORICAL, 6))} | {"numeric": NUMERIC}
MODELS = {
    "tokenmixer_large": {"tokenizer": {"groups": _GROUPS}, "dim": 64, "blocks": 2, "auxiliary": None},
    "dcnv2": {"layers": DCNV2.cross_layers, "hidden": DCNV2.hidden},
    "dlrm": {"structure": "dcn", "bottom": DLRM.bottom[:-1], "top": DLRM.top, "layers": DLRM.cross_layers, "rank": DLRM.rank},
}


def build(name: str) -> Ranker:
    """The model."""
    plain = name.removesuffix("_compiled")
    spec = InputSpec(tables=tuple(TableSpec(name=c, rows=ROWS, bags=(c,)) for c in CATEGORICAL), dense=NUMERIC, tasks=("click",))
    cls = components.get("ranker", plain)
    model: Ranker = cls(cls.Config.model_validate(MODELS[plain] | {"embedding": _TABLES}), spec)
    if plain != name:
        model.compile_dense()
    return model


def contestant(name: str) -> Contestant:
    """The model with its optimizers."""
    torch.manual_seed(0)
    model = build(name)
    dense = {str(i): parameter for i, parameter in enumerate(dense_parameters(model))}
    optimizer = DenseOptimizer(name="adam", learning_rate=DLRM.dense_rate).build(dense)

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

    def tables(batch: RankingBatch) -> None:
        pooled = model.tables.pooled(batch.sparse)
        torch.autograd.backward(pooled.values(), torch.ones_like(pooled.values()))

    return Contestant(prepare, step, predict, tables)


if __name__ == "__main__":
    serve(contestant(sys.argv[1]).handle)
