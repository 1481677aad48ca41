# SPDX-License-Identifier: Apache-2.0
"""FuxiCTR's DCNv2, stepped by its own ``train_step``: Adam over everything, its regularization, gradients clipped at 10.

The wheel holds the edition for long sequences, which averages the candidate's table over the history by itself. Where there is no history
it gets an empty one of length 1, whose mean is zero.
"""

import tempfile
from collections import OrderedDict
from typing import Any

import torch
from fuxictr.features import FeatureMap
from model_zoo.LongCTR.DCNv2 import DCNv2

from benchmarks.ranking_quality.peers_common import Inputs, Peer, main

ITEM, LABEL = "item_id", "label"
_CLIP = 10.0  # the default of its `fit`


def build(request: dict[str, Any]) -> Peer:
    """The model of a request."""
    history = [field["name"] for field in request["fields"] if field["table"] == ITEM and field["name"] != ITEM]
    features = OrderedDict()
    for field in request["fields"]:
        if field["name"] not in history:
            features[field["name"]] = _feature(field)
    folder = tempfile.mkdtemp()
    feature_map = FeatureMap("ranking_quality", folder)
    feature_map.features, feature_map.labels, feature_map.default_emb_dim = features, [LABEL], request["dim"]
    model = DCNv2(
        feature_map,
        model_structure="parallel",
        learning_rate=request["learning_rate"],
        embedding_dim=request["dim"],
        parallel_dnn_hidden_units=request["hidden"],
        num_cross_layers=request["cross_layers"],
        net_dropout=request["dropout"],
        embedding_regularizer=request["embedding_l2"] or None,
        optimizer="adam",
        loss="binary_crossentropy",
        metrics=["AUC"],
        model_root=folder,
        verbose=0,
    )
    model._max_gradient_norm, model._batch_index = _CLIP, 0

    def batch(inputs: Inputs, labels: torch.Tensor | None = None) -> tuple[Inputs, Inputs, torch.Tensor]:
        target = inputs[ITEM]
        earlier = inputs[history[0]] if history else torch.zeros(len(target), 1, dtype=torch.int64)
        fields = {name: value for name, value in inputs.items() if name != ITEM and name not in history}
        items = torch.cat([earlier, target[:, None]], dim=1).flatten()
        return fields | ({} if labels is None else {LABEL: labels}), {ITEM: items}, (earlier != 0).float()

    def step(inputs: Inputs, labels: torch.Tensor) -> None:
        model.train_step(batch(inputs, labels))

    return Peer(model, step, lambda inputs: model(batch(inputs))["y_pred"])


def _feature(field: dict[str, Any]) -> dict[str, Any]:
    """A field in the words of its feature map. Row 0 is padding, a vector of zeros, only where lists are padded."""
    spec = {"source": "item" if field["name"] == ITEM else "context", "vocab_size": field["rows"], "type": "categorical"}
    if field["length"] > 1:
        return spec | {"type": "sequence", "padding_idx": 0, "feature_encoder": "layers.MaskedAveragePooling()"}
    return spec | ({"padding_idx": 0} if field["name"] == ITEM else {})


if __name__ == "__main__":
    main(build)
