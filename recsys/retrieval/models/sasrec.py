# SPDX-License-Identifier: Apache-2.0
"""SASRec (Kang and McAuley, arXiv 1808.09781) with full cross-entropy over the catalogue: the strong plain baseline."""

from typing import Literal

from torch import Tensor

from recsys.core.components import register
from recsys.retrieval.efficiency import RetrieverEfficiency
from recsys.retrieval.id_based import IdConfig, IdRetriever
from recsys.retrieval.items import ItemTable
from recsys.retrieval.transformer import CausalTransformer


@register("retriever", "sasrec")
class SASRec(IdRetriever):
    """A causal transformer over item embeddings, whose state is compared with the same embeddings: see `IdRetriever`.

    Follows the paper: causal self-attention, learned positions, one embedding table for input and output, raw inner products.
    Differs from it: softmax over the whole catalogue instead of one sampled negative (worth more than most later models gain:
    arXiv 2309.07602); pre-norm blocks with GELU feed-forward layers of ``ffn_multiplier``; a learned start token.
    """

    class Config(IdConfig):
        """See `IdConfig`."""

        name: Literal["sasrec"] = "sasrec"

    carries = frozenset({"attention", "routing", "schedule"})

    def __init__(self, config: Config, items: ItemTable) -> None:
        super().__init__(config, items)
        self.transformer = CausalTransformer(config)
        self.take_efficiency(config.efficiency)

    def carry(self, config: RetrieverEfficiency) -> None:
        """See `Retriever.carry`."""
        self.transformer.take_efficiency(config)

    def last(self, x_btd: Tensor, lengths_b: Tensor) -> Tensor:
        """See `IdRetriever.last`."""
        return self.transformer.last(x_btd, lengths_b)

    def sequence(self, x_btd: Tensor, lengths_b: Tensor) -> Tensor:
        """See `IdRetriever.sequence`."""
        states: Tensor = self.transformer(x_btd, lengths_b)
        return states

    def penalized(self, loss: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `IdRetriever.penalized`."""
        return self.transformer.penalized(loss, parts)

    def collaborative_vectors(self) -> Tensor:
        """float ``[N, d]``, detached: what `ItemTable.collaborative` asks for. Zero for items that are not warm."""
        return self.item_vectors().detach().clone()
