# SPDX-License-Identifier: Apache-2.0
"""RPG (KDD 2025): long item codes without order, all of them predicted at once from one state."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.data.batch import SequenceBatch
from recsys.data.world import shared_count
from recsys.retrieval.base import CodeRetriever
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.efficiency import RetrieverEfficiency
from recsys.retrieval.items import ItemTable
from recsys.retrieval.padding import known_histories, training_targets
from recsys.retrieval.state import SlotLogProbs
from recsys.retrieval.transformer import CausalTransformer, TransformerConfig


class ResidualHeads(nn.Module):
    """One residual block for each slot: ``h_k = h + W_k' silu(W_k h)``.

    Args:
        slots: K.
        dim: d.
        init_std: of the weights.
    """

    def __init__(self, slots: int, dim: int, init_std: float) -> None:
        super().__init__()
        self.inner, self.outer = (nn.Parameter(torch.randn(slots, dim, dim) * init_std) for _ in range(2))

    def forward(self, states_sd: Tensor) -> Tensor:
        """``[S, d] → [K, S, d]``."""
        return states_sd + F.silu(states_sd @ self.inner) @ self.outer


@register("retriever", "rpg")
class RPG(CodeRetriever):
    """An item is the mean of its codes' embeddings; a causal transformer reads the history; each slot has a head of its own.

    Follows the authors' release where it says more than the paper: the history's length stays L items whatever the number of codes; the
    probability of a slot's code is a softmax of cosines at temperature ``tau``, with the embeddings that the input has; the loss is the
    mean of the slots' cross-entropies; an item's score is the mean of its codes' log-probabilities.

    Differs from it: the transformer is this project's (pre-norm, learned positions, a learned start token, so that an empty history has a
    state), with a feed-forward part of an integer multiple of d; a head has two matrices with SiLU between them; lists are exact
    (`recsys.retrieval.catalogue.GatherIndex`), in the place of a walk over a graph of items that has to be built anew when items come.

    Raises:
        ConfigError: the items have no codes, or the levels have different sizes.
    """

    class Config(TransformerConfig):
        """Besides the `TransformerConfig`.

        Attributes:
            tau: temperature of the cosines.
        """

        name: Literal["rpg"] = "rpg"
        dim: int = Field(448, ge=1)
        heads: int = Field(4, ge=1)
        ffn_multiplier: int = Field(2, ge=1)
        dropout: float = Field(0.5, ge=0.0, lt=1.0)
        tau: float = Field(0.03, gt=0)

    _first: Tensor
    equal_levels: ClassVar[bool] = True
    carries = frozenset({"attention", "routing", "schedule"})

    def __init__(self, config: Config, items: ItemTable) -> None:
        super().__init__(items)
        self.config, self.max_length = config, config.max_length
        self.slots, self.codes = self.table.levels, self.table.level_sizes[0]
        self.register_buffer("_first", torch.arange(self.slots) * self.codes, persistent=False)  # of each slot's embeddings
        self.embedding = nn.Parameter(torch.randn(self.slots, self.codes, config.dim) * config.init_std)
        self.start = nn.Parameter(torch.randn(config.dim) * config.init_std)
        self.transformer = CausalTransformer(config)
        self.head = ResidualHeads(self.slots, config.dim, config.init_std)
        self._take_codes()
        self.take_efficiency(config.efficiency)

    def loss(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over targets and slots of cross-entropies.

        Raises:
            DataError: no targets, a row longer than ``max_length``, or a target outside its history.
            CannotScoreNewItems: a row without codes.
        """
        padded, lengths = known_histories(batch, self.max_length, len(self.tokens))
        targets, states = training_targets(batch, self.max_length, known=None)
        log_probs_ksv = self._log_probs(self._states(padded, lengths)[states.row, states.position])
        wanted_km = (self.tokens[targets] - self._first).T
        taken = log_probs_ksv[torch.arange(self.slots, device=targets.device)[:, None], states.of_target, wanted_km]
        loss = -taken.sum() / (self.slots * shared_count(len(targets), taken))
        return self.transformer.penalized(loss, {"cross_entropy": loss.detach()})

    def encode(self, batch: SequenceBatch) -> SlotLogProbs:
        """The codes' log-probabilities after the last ``max_length`` events of each row, divided by K: ``[B, K, V]``.

        Raises:
            CannotScoreNewItems: a row without codes.
        """
        padded, lengths = known_histories(self.pruned(batch), self.max_length, len(self.tokens))
        last_bd = self.transformer.last(self._read(padded), lengths + 1)
        return SlotLogProbs(self._log_probs(last_bd).transpose(0, 1) / self.slots, self.table.tokenizer)

    def event_vectors(self, items: Tensor) -> Tensor:
        """See `Retriever.event_vectors`: the means of the codes' embeddings."""
        return F.embedding_bag(self.tokens[items], self.embedding.flatten(0, 1), mode="mean")

    def tokens_of(self, table: CodeTable) -> Tensor:
        """See `CodeRetriever.tokens_of`."""
        return table.codes + self._first.cpu()

    def _states(self, padded_bl: Tensor, lengths_b: Tensor) -> Tensor:
        """``[B, L + 1, d]``: the state after 0, 1, … L events, of which each row has ``lengths_b``."""
        states: Tensor = self.transformer(self._read(padded_bl), lengths_b + 1)
        return states

    def _read(self, padded_bl: Tensor) -> Tensor:
        """``[B, L + 1, d]``: the start token and the items."""
        items_bld = self.event_vectors(padded_bl.flatten()).unflatten(0, padded_bl.shape)
        return torch.cat((self.start.expand(len(padded_bl), 1, -1), items_bld), 1)

    def carry(self, config: RetrieverEfficiency) -> None:
        """See `Retriever.carry`."""
        self.transformer.take_efficiency(config)

    def _log_probs(self, states_sd: Tensor) -> Tensor:
        """``[K, S, V]``, in float32 or wider; under autocast the products are narrower, as those of the transformer are."""
        wide = torch.promote_types(self.embedding.dtype, torch.float32)
        heads_ksd = F.normalize(self.head(states_sd).to(wide), dim=-1)
        cosines_ksv = heads_ksd @ F.normalize(self.embedding.to(wide), dim=-1).transpose(1, 2)
        return (cosines_ksv.to(wide) / self.config.tau).log_softmax(-1)
