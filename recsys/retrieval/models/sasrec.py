# SPDX-License-Identifier: Apache-2.0
"""SASRec (Kang and McAuley, arXiv 1808.09781) with full cross-entropy over the catalogue: the strong plain baseline."""

from typing import Literal

import torch
from torch import Tensor, nn

from recsys.core.components import register
from recsys.data.batch import SequenceBatch
from recsys.retrieval.base import VectorRetriever
from recsys.retrieval.items import ItemTable
from recsys.retrieval.padding import pad_last, require_known_rows, training_targets
from recsys.retrieval.softmax import catalogue_cross_entropy
from recsys.retrieval.state import SlotVectors
from recsys.retrieval.transformer import CausalTransformer, TransformerConfig


@register("retriever", "sasrec")
class SASRec(VectorRetriever):
    """A causal transformer over item embeddings, whose state is compared with the same embeddings.

    Follows the paper: causal self-attention, learned positions, one embedding table for input and output, raw inner products.
    Differs from it: softmax over the whole catalogue instead of one sampled negative (worth more than most later models gain:
    arXiv 2309.07602); pre-norm blocks with GELU feed-forward layers of ``ffn_multiplier``; a learned start token, so that an empty
    history has a state too. Positions count from the start of the window, which makes a state independent of what follows it: all
    prefixes train in one pass.

    The model is bound to the items of its training. Items that are not warm have a zero embedding: in a history they leave a gap
    with nothing but a position, and the softmax leaves them out, lest it push them down. `scorable` keeps them out of an index.
    """

    class Config(TransformerConfig):
        """See `TransformerConfig`."""

        name: Literal["sasrec"] = "sasrec"

    warm: Tensor

    def __init__(self, config: Config, items: ItemTable) -> None:
        super().__init__()
        self.config = config
        self.max_length = config.max_length
        self.count = items.count
        self.register_buffer("warm", items.warm.bool().clone())
        self.item = nn.Embedding(items.count, config.dim)
        nn.init.normal_(self.item.weight, std=config.init_std)
        with torch.no_grad():
            self.item.weight[~self.warm] = 0.0
        self.start = nn.Parameter(torch.randn(config.dim) * config.init_std)
        self.transformer = CausalTransformer(config)

    @property
    def scorable(self) -> Tensor:
        """bool ``[N]``: the items that the model can tell apart, which are those of its training."""
        return self.warm

    def loss(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of the targets over the warm items; a target that is not warm is left out.

        Raises:
            DataError: no targets, a row longer than ``max_length``, or a target outside its history.
            CannotScoreNewItems: a row that the catalogue did not have when the model was built.
        """
        require_known_rows(batch, self.count)
        targets, states = training_targets(batch, self.max_length, known=self.warm)
        padded, _ = pad_last(batch, self.max_length)
        hidden_sd = self._states(padded)[states.row, states.position]
        warm_rank = self.warm.cumsum(0) - 1
        (loss,) = catalogue_cross_entropy(hidden_sd[:, None], self.item.weight[self.warm][:, None], warm_rank[targets], states.of_target)
        return loss, {"cross_entropy": loss.detach()}

    def encode(self, batch: SequenceBatch) -> SlotVectors:
        """The state after the last ``max_length`` events of each row, in a single slot: ``[B, 1, d]``.

        Raises:
            CannotScoreNewItems: a history holds a row that the catalogue did not have when the model was built.
        """
        require_known_rows(batch, self.count)
        padded, lengths = pad_last(batch, self.max_length)
        return SlotVectors(self._states(padded)[torch.arange(len(batch), device=lengths.device), lengths][:, None])

    def item_vectors(self) -> Tensor:
        """float ``[N, d]``: the item embeddings; zero for items that are not warm."""
        return self.item.weight * self.warm[:, None]

    def collaborative_vectors(self) -> Tensor:
        """float ``[N, d]``, detached: what `ItemTable.collaborative` asks for. Zero for items that are not warm."""
        return self.item_vectors().detach().clone()

    def _states(self, padded_bl: Tensor) -> Tensor:
        """``[B, L + 1, d]``: the state after 0, 1, … L events."""
        start = self.start.expand(len(padded_bl), 1, -1)
        states: Tensor = self.transformer(torch.cat((start, self.item(padded_bl)), 1))
        return states
