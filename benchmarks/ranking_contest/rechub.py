# SPDX-License-Identifier: Apache-2.0
"""torch-rechub's DCNv2 and DeepFM, trained as its own `CTRTrainer` does: Adam over everything, binary cross-entropy on probabilities."""

import sys

import numpy as np
import torch
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.ranking import DCNv2, DeepFM

from benchmarks.ranking_contest.contest import Contestant
from benchmarks.ranking_contest.data import DENSE, FIELDS, ROWS, Rows
from benchmarks.worker import serve

MLP = {"dims": [400, 400, 400], "dropout": 0.0, "activation": "relu"}


def build(name: str) -> torch.nn.Module:
    """The model at the protocol's sizes: embeddings of width 16, an MLP of 400-400-400."""
    sparse = [SparseFeature(f"c{i}", vocab_size=ROWS, embed_dim=16) for i in range(FIELDS)]
    dense = [DenseFeature(f"d{i}") for i in range(DENSE)]
    if name == "dcnv2":
        return DCNv2(features=sparse + dense, n_cross_layers=3, mlp_params=MLP)
    return DeepFM(deep_features=sparse + dense, fm_features=sparse, mlp_params=MLP)


def contestant(name: str) -> Contestant:
    """The model with the library's default optimizer at its usual rate."""
    torch.manual_seed(0)
    model = build(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = torch.nn.BCELoss()

    def prepare(rows: Rows) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inputs = {f"c{i}": torch.from_numpy(rows.categorical[:, i].copy()) for i in range(FIELDS)}
        inputs |= {f"d{i}": torch.from_numpy(rows.dense[:, i].copy()) for i in range(DENSE)}
        return inputs, torch.from_numpy(rows.labels)

    def step(batch: tuple[dict[str, torch.Tensor], torch.Tensor]) -> None:
        model.train()
        inputs, labels = batch
        loss = criterion(model(inputs), labels)
        model.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def predict(batch: tuple[dict[str, torch.Tensor], torch.Tensor]) -> np.ndarray:
        model.eval()
        return model(batch[0]).numpy()

    return Contestant(prepare, step, predict)


if __name__ == "__main__":
    serve(contestant(sys.argv[1]).handle)
