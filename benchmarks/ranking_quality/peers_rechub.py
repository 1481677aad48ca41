# SPDX-License-Identifier: Apache-2.0
"""torch-rechub's DCNv2, stepped as its `CTRTrainer` does: Adam over everything, binary cross-entropy, its own regularization loss.

Its cross network has full-rank matrices here, as ours and FuxiCTR's have; its default would be a mixture of low-rank ones.
"""

from typing import Any

import torch
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.basic.loss_func import RegularizationLoss
from torch_rechub.models.ranking import DCNv2

from benchmarks.ranking_quality.peers_common import Inputs, Peer, main


def build(request: dict[str, Any]) -> Peer:
    """The model of a request, with single values as they are and lists as means."""
    owners = {field["name"] for field in request["fields"]}
    features = []
    for field in request["fields"]:
        shared = field["table"] if field["table"] != field["name"] and field["table"] in owners else None
        common = {"vocab_size": field["rows"], "embed_dim": request["dim"], "shared_with": shared}
        if field["length"] == 1:
            features.append(SparseFeature(field["name"], **common))
        else:
            features.append(SequenceFeature(field["name"], pooling="mean", padding_idx=0, **common))
    mlp = {"dims": request["hidden"], "dropout": request["dropout"], "activation": "relu"}
    model = DCNv2(features, n_cross_layers=request["cross_layers"], mlp_params=mlp, use_low_rank_mixture=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=request["learning_rate"])
    criterion = torch.nn.BCELoss()
    # Its coefficient multiplies the sum of squares, FuxiCTR's half of it.
    penalty = RegularizationLoss(embedding_l2=request["embedding_l2"] / 2)

    def step(inputs: Inputs, labels: torch.Tensor) -> None:
        loss = criterion(model(inputs), labels) + penalty(model)
        model.zero_grad()
        loss.backward()
        optimizer.step()

    return Peer(model, step, model)


if __name__ == "__main__":
    main(build)
