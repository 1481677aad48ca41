# SPDX-License-Identifier: Apache-2.0
"""TorchRec: an embedding bag collection over a keyed jagged tensor, forward and backward."""

import torch
import torchrec
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from pipelines.doctor.probes import Trial, expect


def probe() -> Trial:
    """Try what the rankers' embeddings need."""
    trial = Trial(torchrec.__version__)
    trial.attempt("embedding bags forward and backward", _bags)
    return trial


def _bags() -> None:
    config = EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=10, feature_names=["f"])
    collection = EmbeddingBagCollection(tables=[config])
    features = KeyedJaggedTensor(keys=["f"], values=torch.tensor([1, 1, 3]), lengths=torch.tensor([2, 1]))
    pooled = collection(features)["f"]
    weight = next(collection.parameters())
    expect(torch.allclose(pooled, torch.stack([2 * weight[1], weight[3]])), "a pooled embedding")
    pooled.sum().backward()
    expect(weight.grad is not None and torch.equal(weight.grad[:4, 0], torch.tensor([0.0, 2, 0, 1])), "the gradient of a table")
