# SPDX-License-Identifier: Apache-2.0
"""What the retrievers share that have one embedding for each item of their training, and no other knowledge of items."""

from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys.data.batch import SequenceBatch
from recsys.retrieval.base import VectorRetriever
from recsys.retrieval.items import ItemTable
from recsys.retrieval.padding import after_all, known_histories, training_targets
from recsys.retrieval.softmax import catalogue_cross_entropy, sampled_cross_entropy
from recsys.retrieval.state import SlotVectors
from recsys.retrieval.transformer import TransformerConfig


class IdConfig(TransformerConfig):
    """Besides the `TransformerConfig`.

    Attributes:
        similarity: of a state and an item: the inner product, or the cosine divided by ``tau``.
        tau: temperature of the cosine.
        negatives: so many items are drawn evenly for the training softmax of a batch; null for all of them.
    """

    similarity: Literal["dot", "cosine"] = "dot"
    tau: float = Field(0.05, gt=0)
    negatives: int | None = Field(None, ge=1)


class IdRetriever(VectorRetriever):
    """States of a causal model over item embeddings, compared with the same embeddings.

    A learned start token stands before the history, so that an empty one has a state too. Positions count from the start of the window,
    which makes a state independent of what follows it: all prefixes train in one pass.

    The model is bound to the items of its training. Items that are not warm have a zero embedding: in a history they leave a gap
    with nothing but a position, and the softmax leaves them out, lest it push them down. `scorable` keeps them out of an index.
    """

    warm: Tensor

    def __init__(self, config: IdConfig, items: ItemTable) -> None:
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

    @abstractmethod
    def sequence(self, x_btd: Tensor, lengths_b: Tensor) -> Tensor:
        """``[B, T, d] → [B, T, d]``: the start token and the items, ``lengths_b`` in all; each place sees itself and those before it."""

    def last(self, x_btd: Tensor, lengths_b: Tensor) -> Tensor:
        """``[B, d]``: the last of the ``lengths_b`` states of each row, the start token's among them."""
        return after_all(self.sequence(x_btd, lengths_b), lengths_b - 1)

    @property
    def scorable(self) -> Tensor:
        """bool ``[N]``: the items that the model can tell apart, which are those of its training."""
        return self.warm

    def loss(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of the targets over the warm items, or a sample of them; a target that is not warm is left out.

        Raises:
            DataError: no targets, a row longer than ``max_length``, or a target outside its history.
            CannotScoreNewItems: a row that the catalogue did not have when the model was built.
        """
        padded, lengths = known_histories(batch, self.max_length, self.count)
        targets, states = training_targets(batch, self.max_length, known=self.warm)
        hidden_sd = self._states(padded, lengths)[states.row, states.position]
        candidates_cd, rank = self._compared(self.item.weight[self.warm]), self.warm.cumsum(0) - 1
        loss = self._cross_entropy(hidden_sd, candidates_cd, rank[targets], states.of_target)
        return self.penalized(loss, {"cross_entropy": loss.detach()})

    def penalized(self, loss: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss with what the model adds to it on its own account, and its parts."""
        return loss, parts

    def encode(self, batch: SequenceBatch) -> SlotVectors:
        """The state after the last ``max_length`` events of each row, in a single slot: ``[B, 1, d]``.

        Raises:
            CannotScoreNewItems: a history holds a row that the catalogue did not have when the model was built.
        """
        padded, lengths = known_histories(self.pruned(batch), self.max_length, self.count)
        return SlotVectors(self._compared_state(self.last(self._read(padded), lengths + 1))[:, None])

    def event_vectors(self, items: Tensor) -> Tensor:
        """See `Retriever.event_vectors`: the embeddings."""
        vectors: Tensor = self.item(items)
        return vectors

    def item_vectors(self) -> Tensor:
        """float ``[N, d]``: the item embeddings, of unit length under ``cosine``; zero for items that are not warm."""
        return self._compared(self.item.weight) * self.warm[:, None]

    def _compared(self, items_nd: Tensor) -> Tensor:
        """Embeddings as states are compared with them."""
        return F.normalize(items_nd, dim=-1) if self.config.similarity == "cosine" else items_nd

    def _cross_entropy(self, states_sd: Tensor, items_cd: Tensor, targets: Tensor, of_target: Tensor) -> Tensor:
        if self.config.negatives is None:
            return catalogue_cross_entropy(states_sd[:, None], items_cd[:, None], targets, of_target)[0]
        count = len(items_cd)
        drawn = torch.randint(count, (self.config.negatives,), device=items_cd.device)
        evenly = items_cd.new_full((count,), 1.0 / count)
        return sampled_cross_entropy(states_sd, items_cd, targets, of_target, drawn, evenly)

    def _states(self, padded_bl: Tensor, lengths_b: Tensor) -> Tensor:
        """``[B, L + 1, d]``: the state after 0, 1, … L events, of which each row has ``lengths_b``."""
        return self._compared_state(self.sequence(self._read(padded_bl), lengths_b + 1))

    def _read(self, padded_bl: Tensor) -> Tensor:
        """``[B, L + 1, d]``: the start token and the items."""
        return torch.cat((self.start.expand(len(padded_bl), 1, -1), self.item(padded_bl)), 1)

    def _compared_state(self, states: Tensor) -> Tensor:
        """States as items are compared with them."""
        return F.normalize(states, dim=-1) / self.config.tau if self.config.similarity == "cosine" else states
