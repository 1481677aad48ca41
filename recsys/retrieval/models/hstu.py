# SPDX-License-Identifier: Apache-2.0
"""HSTU (Zhai et al., arXiv 2402.17152) as a retriever: layers of pointwise attention over item embeddings."""

from typing import Literal, cast

from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.schedule import ProbedLayer, PruneSchedule
from recsys.efficiency.view import TokenView, held, through_tokens, to_padded
from recsys.layers.hstu import HSTULayer
from recsys.retrieval.efficiency import RetrieverEfficiency, placed_schedule
from recsys.retrieval.id_based import IdConfig, IdRetriever
from recsys.retrieval.items import ItemTable
from recsys.retrieval.transformer import last_queries


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

    carries = frozenset({"schedule"})

    def __init__(self, config: Config, items: ItemTable) -> None:
        super().__init__(config, items)
        window = config.max_length + 1
        self.position = nn.Embedding(window, config.dim)
        nn.init.normal_(self.position.weight, std=config.init_std)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(HSTULayer(config.dim, config.heads, window, config.dropout) for _ in range(config.blocks))
        self.schedule: PruneSchedule | None = None
        self.take_efficiency(config.efficiency)

    def carry(self, config: RetrieverEfficiency) -> None:
        """See `Retriever.carry`."""
        self.schedule = placed_schedule(config, self, len(self.layers) - 1)

    def sequence(self, x_btd: Tensor, lengths_b: Tensor) -> Tensor:
        """See `IdRetriever.sequence`."""

        def run(x_sd: Tensor, offsets: Tensor) -> Tensor:
            for layer in self._layers():
                x_sd = layer.jagged(x_sd, offsets)
            return x_sd

        return through_tokens(self._placed(x_btd), lengths_b, run)

    def last(self, x_btd: Tensor, lengths_b: Tensor) -> Tensor:
        """See `IdRetriever.last`; events that a schedule drops leave the distances between the others as they were."""
        if self.schedule is None:
            return super().last(x_btd, lengths_b)
        layers = [self._probed(layer) for layer in self._layers()]
        values, kept = self.schedule(layers, TokenView.padded(self._placed(x_btd), lengths_b))
        last: Tensor = values[kept.offsets[1:] - 1]
        return last

    def _layers(self) -> list[HSTULayer]:
        return cast(list[HSTULayer], list(self.layers))

    def _placed(self, x_btd: Tensor) -> Tensor:
        placed: Tensor = self.dropout(x_btd + self.position.weight[: x_btd.shape[1]])
        return placed

    def _probed(self, layer: HSTULayer) -> ProbedLayer:
        """A layer over jagged events; it has no feed-forward part to tell of."""

        def run(view: TokenView) -> tuple[Tensor, LayerProbe]:
            x_bld = to_padded(view.values, view.offsets)
            inside = held(view.lengths, x_bld.shape[1])
            places_bl = to_padded(view.positions, view.offsets, fill=layer.max_length)  # padding stands behind all, so that nobody sees it
            normed = layer.norm_in(x_bld)
            u, value, query, key = layer.parts(normed)
            added = layer.added(u, value, query, key, places_bl[:, None])
            probe = LayerProbe(
                0,
                attention_in=normed[inside],
                attention_out=added[inside],
                query=last_queries(1)(query, key, value, view.lengths),
                key=key.transpose(1, 2)[inside],
                value=value.transpose(1, 2)[inside],
            )
            return (x_bld + added)[inside], probe

        return run
