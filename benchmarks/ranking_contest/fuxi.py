# SPDX-License-Identifier: Apache-2.0
"""FuxiCTR's DCNv2 (its wheel's edition for long sequences, with an empty history), stepped by its own ``train_step`` with its defaults."""

import tempfile
from collections import OrderedDict

import numpy as np
import torch
from fuxictr.features import FeatureMap
from model_zoo.LongCTR.DCNv2 import DCNv2

from benchmarks.ranking_contest.contest import Contestant
from benchmarks.ranking_contest.data import DENSE, FIELDS, ROWS, Rows
from benchmarks.ranking_contest.sizes import DCNV2
from benchmarks.worker import serve

ITEM, LABEL = "c0", "label"  # the model wants a candidate: the first field is it
Batch = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]


def build() -> torch.nn.Module:
    """The model: cross layers beside an MLP; a numeric column is embedded like any other."""
    features: OrderedDict[str, dict[str, object]] = OrderedDict()
    for i in range(FIELDS):
        features[f"c{i}"] = {"source": "item" if i == 0 else "context", "vocab_size": ROWS + 1, "type": "categorical"}
    features[ITEM]["padding_idx"] = 0
    for i in range(DENSE):
        features[f"d{i}"] = {"source": "context", "type": "numeric"}
    folder = tempfile.mkdtemp()
    feature_map = FeatureMap("contest", folder)
    feature_map.features, feature_map.labels, feature_map.default_emb_dim = features, [LABEL], DCNV2.embedding
    model = DCNv2(
        feature_map,
        model_structure="parallel",
        learning_rate=DCNV2.dense_rate,
        embedding_dim=DCNV2.embedding,
        parallel_dnn_hidden_units=list(DCNV2.hidden),
        num_cross_layers=DCNV2.cross_layers,
        optimizer="adam",
        loss="binary_crossentropy",
        metrics=["AUC"],
        model_root=folder,
        verbose=0,
    )
    model._max_gradient_norm, model._batch_index = 10.0, 0  # as its `fit` sets them
    return model


def contestant() -> Contestant:
    """The model with the library's own training step."""
    torch.manual_seed(0)
    model = build()

    def prepare(rows: Rows) -> Batch:
        inputs = {f"c{i}": torch.from_numpy(rows.categorical[:, i].copy()) for i in range(1, FIELDS)}
        inputs |= {f"d{i}": torch.from_numpy(rows.dense[:, i].copy()) for i in range(DENSE)}
        target = torch.from_numpy(rows.categorical[:, 0].copy()) + 1
        items = torch.stack([torch.zeros_like(target), target], dim=1).flatten()
        return inputs | {LABEL: torch.from_numpy(rows.labels)}, {ITEM: items}, torch.zeros(len(target), 1)

    def step(batch: Batch) -> None:
        model.train()
        model.train_step(batch)

    @torch.no_grad()
    def predict(batch: Batch) -> np.ndarray:
        model.eval()
        return np.asarray(model(batch)["y_pred"]).reshape(-1)

    return Contestant(prepare, step, predict)


if __name__ == "__main__":
    serve(contestant().handle)
