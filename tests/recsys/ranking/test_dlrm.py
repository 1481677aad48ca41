# SPDX-License-Identifier: Apache-2.0
"""DLRM against TorchRec's."""

from typing import Any

import pytest
import torch
from torch import nn
from torchrec.models import dlrm as torchrec_dlrm
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core import components
from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec, TableSpec

DIM = 8


def plain_batch(rows: list[dict[str, Any]], spec: InputSpec) -> RankingBatch:
    bags = [row[key] for key in spec.bag_keys for row in rows]
    sparse = KeyedJaggedTensor(
        keys=list(spec.bag_keys), values=torch.tensor([v for bag in bags for v in bag]), lengths=torch.tensor([len(bag) for bag in bags])
    )
    none = KeyedJaggedTensor(keys=[], values=torch.empty(0, dtype=torch.int64), lengths=torch.empty(0, dtype=torch.int64))
    return RankingBatch(sparse=sparse, sequences=none, dense=torch.tensor([row["dense"] for row in rows]))


@pytest.mark.parametrize("structure", ["dot", "dcn"])
def test_dlrm_equals_torchrecs_on_equal_weights(make_rows: Any, structure: str) -> None:
    tables = (TableSpec(name="user", rows=20, bags=("user",)), TableSpec(name="genre", rows=8, bags=("genres",)))
    flat = InputSpec(tables=tables, dense=("age", "popularity"), tasks=("click",))
    settings = {"structure": structure, "bottom": (9,), "top": (7, 5), "layers": 2, "rank": 3, "embedding": {"dim": DIM}}
    cls = components.get("ranker", "dlrm")
    torch.manual_seed(0)
    ours = cls(parse(cls.Config, settings, source="test"), flat)
    bags = [EmbeddingBagConfig(name=t.name, embedding_dim=DIM, num_embeddings=t.rows, feature_names=list(t.bags)) for t in tables]
    sizes: dict[str, Any] = {"dense_in_features": 2, "dense_arch_layer_sizes": [9, DIM], "over_arch_layer_sizes": [7, 5, 1]}
    if structure == "dot":
        theirs = torchrec_dlrm.DLRM(EmbeddingBagCollection(bags), **sizes)
    else:
        theirs = torchrec_dlrm.DLRM_DCN(EmbeddingBagCollection(bags), **sizes, dcn_num_layers=2, dcn_low_rank_dim=3)
    pairs = [(ours.body.bottom, theirs.dense_arch), (nn.ModuleList([ours.body.top, ours.head]), theirs.over_arch)]
    with torch.no_grad():
        for table in tables:
            weight = ours.tables.pooled.embedding_bags[table.name].weight
            nn.init.normal_(weight)
            theirs.sparse_arch.embedding_bag_collection.embedding_bags[table.name].weight.copy_(weight)
        for mine, other in pairs:
            linear, twins = ([m for m in part.modules() if isinstance(m, nn.Linear)] for part in (mine, other))
            for a, b in zip(linear, twins, strict=True):
                b.load_state_dict(a.state_dict())
        if structure == "dcn":
            net = theirs.inter_arch.crossnet
            for layer, w, v, bias in zip(ours.body.interaction.layers, net.W_kernels, net.V_kernels, net.bias, strict=True):
                nn.init.normal_(layer.up.bias)
                for theirs_one, ours_one in ((w, layer.up.weight), (v, layer.down.weight), (bias, layer.up.bias)):
                    theirs_one.copy_(ours_one)
    batch = plain_batch(make_rows([0] * 5), flat)
    logits = ours(batch)
    torch.testing.assert_close(logits, theirs(batch.dense, batch.sparse))
    first = ours.body.bottom.layers[0].weight, next(m for m in theirs.dense_arch.modules() if isinstance(m, nn.Linear)).weight
    logits.sum().backward()
    theirs(batch.dense, batch.sparse).sum().backward()
    torch.testing.assert_close(first[0].grad, first[1].grad)


def test_dlrm_with_nothing_to_pair_is_an_error(spec: InputSpec) -> None:
    cls = components.get("ranker", "dlrm")
    one, small = InputSpec(tables=spec.tables[:1], tasks=spec.tasks), {"embedding": {"dim": DIM}}
    with pytest.raises(ConfigError, match="structure: 'dot' expects 2 fields or more beside dense columns, got 1"):
        cls(parse(cls.Config, small, source="test"), one)
    assert cls(parse(cls.Config, {"structure": "dcn"} | small, source="test"), one).interact(torch.ones(3, DIM)).shape == (3, 2)
