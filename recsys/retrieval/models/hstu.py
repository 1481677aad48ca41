# SPDX-License-Identifier: Apache-2.0
"""HSTU (Zhai et al., arXiv 2402.17152) as a retriever: layers of pointwise attention over item embeddings."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.layers.hstu import HSTULayer
from recsys.retrieval.id_based import IdConfig, IdRetriever
from recsys.retrieval.items import ItemTable


@register("retriever", "hstu")
class HSTU(IdRetriever):
    """Layers of `HSTULayer` over item embeddings and learned positions, compared by cosines with the same embeddings: see `IdRetriever`.

    Follows the authors' public recipe for MovieLens: cosines at temperature 0.05, positions added to the embeddings, dropout on the input
    and within the layers.

    Differs from it: the softmax is over the whole catalogue unless ``negatives`` are drawn (there, 128); a bias by distance alone, without
    the one by time, since histories come without times; one bias for all heads; a learned start token.
    """

    class Config(IdConfig):
        """See `IdConfig`; ``blocks`` are layers, and ``ffn_multiplier`` has no meaning, as there is no feed-forward part."""

        name: Literal["hstu"] = "hstu"
        heads: int = Field(1, ge=1)
        similarity: Literal["dot", "cosine"] = "cosine"

    def __init__(self, config: Config, items: ItemTable) -> None:
        super().__init__(config, items)
        window = config.max_length + 1
        self.position = nn.Embedding(window, config.dim)
        nn.init.normal_(self.position.weight, std=config.init_std)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(HSTULayer(config.dim, config.heads, window, config.dropout) for _ in range(config.blocks))
        self.take_efficiency(config.efficiency)

    def sequence(self, x_btd: Tensor, lengths_b: Tensor) -> Tensor:
        """See `IdRetriever.sequence`."""
        x_btd = self.dropout(x_btd + self.position.weight[: x_btd.shape[1]])
        for layer in self.layers:
            x_btd = layer(x_btd)
        return x_btd
