# SPDX-License-Identifier: Apache-2.0
"""TorchRec's own DLRM_DCN over its fused embedding collection: row-wise Adagrad in the tables, Adam for what is dense."""

import numpy as np
import torch
from torchrec.models.dlrm import DLRM_DCN
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.ranking_contest.contest import Contestant
from benchmarks.ranking_contest.data import DENSE, FIELDS, ROWS, Rows
from benchmarks.ranking_contest.sizes import DLRM
from benchmarks.worker import serve

KEYS = [f"c{i}" for i in range(FIELDS)]
Batch = tuple[torch.Tensor, KeyedJaggedTensor, torch.Tensor]


def contestant() -> Contestant:
    """The model, trained step by step as TorchRec's example does without its distributed pipeline."""
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=k, embedding_dim=DLRM.embedding, num_embeddings=ROWS, feature_names=[k], init_fn=_small) for k in KEYS
    ]
    collection = FusedEmbeddingBagCollection(tables, RowWiseAdagrad, {"lr": DLRM.table_rate, "eps": 1e-8})
    model = DLRM_DCN(
        collection,
        dense_in_features=DENSE,
        dense_arch_layer_sizes=list(DLRM.bottom),
        over_arch_layer_sizes=[*DLRM.top, 1],
        dcn_num_layers=DLRM.cross_layers,
        dcn_low_rank_dim=DLRM.rank,
    )
    fused = {id(p) for p in collection.parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if id(p) not in fused], lr=DLRM.dense_rate)
    criterion = torch.nn.BCEWithLogitsLoss()

    def prepare(rows: Rows) -> Batch:
        values = torch.from_numpy(np.ascontiguousarray(rows.categorical.T)).flatten()
        lengths = torch.ones(len(values), dtype=torch.int32)
        sparse = KeyedJaggedTensor(keys=KEYS, values=values, lengths=lengths)
        return torch.from_numpy(rows.dense), sparse, torch.from_numpy(rows.labels)

    def step(batch: Batch) -> None:
        model.train()
        dense, sparse, labels = batch
        optimizer.zero_grad(set_to_none=True)
        loss = criterion(model(dense, sparse).squeeze(1), labels)
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def predict(batch: Batch) -> np.ndarray:
        model.eval()
        return np.asarray(torch.sigmoid(model(batch[0], batch[1])).squeeze(1))

    return Contestant(prepare, step, predict)


def _small(weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.init.normal_(weight, std=DLRM.init_std)


if __name__ == "__main__":
    serve(contestant().handle)
