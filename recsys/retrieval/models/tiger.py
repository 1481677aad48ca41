# SPDX-License-Identifier: Apache-2.0
"""TIGER (NeurIPS 2023, arXiv 2305.05065): the next item's codes are generated one after another from the codes of the history."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from recsys.core.components import register
from recsys.core.errors import DataError
from recsys.data.batch import SequenceBatch
from recsys.data.world import shared_count
from recsys.efficiency.decoding.steps import TreeSteps
from recsys.efficiency.decoding.token_recycling import AdjacencyDraft
from recsys.efficiency.decoding.tree import DraftSource, PrefixTree
from recsys.efficiency.schedule import PruneSchedule
from recsys.retrieval.base import CodeRetriever
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.efficiency import DraftConfig, RetrieverEfficiency, placed_schedule
from recsys.retrieval.items import ItemTable
from recsys.retrieval.padding import known_histories, training_targets
from recsys.retrieval.state import EncoderMemory, PrefixScorer
from recsys.retrieval.t5 import T5, BeamDecoder, T5Config
from recsys.retrieval.t5_tree import T5Nodes


@register("retriever", "tiger")
class TIGER(CodeRetriever):
    """An encoder-decoder over codes: each code of each level is a token; a history is its items' codes in order.

    Follows the paper: T5 with 4 + 4 layers of 6 heads of 64 over a width of 128, and 20 items of history. Codes come from any item
    tokenizer; the paper's are RQ-VAE's, with one more level that numbers the items of a collision (`recsys.retrieval.codes`).

    Differs from it, or chosen where it is silent: no token for the user (worth .0009 of Recall@5 there), since serving meets new users,
    but a start token before the history, so that an empty one can be encoded; each level's softmax is over its own codes, as no other can
    follow (``softmax: vocabulary`` is over all of them, as a plain T5 has it); no end token, as all items have as many codes.

    Attributes:
        drafts: what decoding guesses ahead (`recsys.efficiency.decoding`); lists are the same with them and without.
        schedule: which items go on from layer to layer of the encoder when a history is asked for; the decoder reads those that are left.

    Raises:
        ConfigError: the items have no codes.
    """

    class Config(T5Config):
        """Besides the `T5Config`.

        Attributes:
            max_length: the longest history, in items.
            softmax: over the codes of a level, or over the whole vocabulary.
        """

        name: Literal["tiger"] = "tiger"
        max_length: int = Field(20, ge=1)
        softmax: Literal["level", "vocabulary"] = "level"

    carries = frozenset({"drafts", "schedule"})

    def __init__(self, config: Config, items: ItemTable) -> None:
        super().__init__(items)
        self.config, self.max_length = config, config.max_length
        sizes = self.table.level_sizes
        self._first = [1 + sum(sizes[:level]) for level in range(len(sizes))]  # token 0 pads and starts
        self.t5 = T5(config, 1 + sum(sizes))
        self.drafts: Sequence[DraftSource] = ()
        self.schedule: PruneSchedule | None = None
        self._take_codes()
        self.take_efficiency(config.efficiency)

    def loss(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over targets of the sum over levels of cross-entropies, so that it is an item's negative log-likelihood.

        Raises:
            DataError: no targets, a row longer than ``max_length``, or a target outside its history.
            CannotScoreNewItems: a row without codes.
        """
        padded, _ = known_histories(batch, self.max_length, len(self.tokens))
        targets, states = training_targets(batch, self.max_length, known=None)
        memory, valid = self._memory(padded[states.row], states.position)
        tokens_ml = self.tokens[targets]
        start = tokens_ml.new_zeros(len(tokens_ml), 1)
        states_mld = self.t5.decode(torch.cat((start, tokens_ml[:, :-1]), 1), memory[states.of_target], valid[states.of_target])
        count = shared_count(len(tokens_ml), states_mld)
        losses = [
            F.cross_entropy(self._logits(states_mld[:, level], level), tokens_ml[:, level] - self._base(level), reduction="sum") / count
            for level in range(self.table.levels)
        ]
        loss = torch.stack(losses).sum()
        return loss, {f"level_{level}": part.detach() for level, part in enumerate(losses)}

    def encode(self, batch: SequenceBatch) -> EncoderMemory:
        """The encoded last ``max_length`` events of each row.

        Raises:
            CannotScoreNewItems: a row without codes.
        """
        padded, lengths = known_histories(self.pruned(batch), self.max_length, len(self.tokens))
        values, valid = self._memory(padded, lengths, self.schedule)
        return EncoderMemory(values, valid, self.table.tokenizer, self._scorer)

    def tree(self, memory_bsd: Tensor, valid_bs: Tensor, drafts: Sequence[DraftSource] = ()) -> PrefixTree:
        """The prefixes of codes that may follow each encoded history, with log-probabilities of the next level's codes."""
        nodes = T5Nodes(self.t5, memory_bsd, valid_bs, self._token_at, self._log_probs_at)
        return PrefixTree(nodes, 0, drafts, self.table.levels, len(memory_bsd))

    def _scorer(self, memory_bsd: Tensor, valid_bs: Tensor) -> PrefixScorer:
        """What decodes: level by level for all beams together, or over a tree of prefixes where there are ``drafts``."""
        if self.drafts:
            return TreeSteps(self.tree(memory_bsd, valid_bs, self.drafts))
        return _Scorer(self, memory_bsd, valid_bs)

    def _token_at(self, codes: Tensor, depths: Tensor) -> Tensor:
        """The tokens of codes of the level before each depth; token 0 at depth 0."""
        first = torch.tensor(self._first, device=codes.device)[(depths - 1).clamp(min=0)]
        return torch.where(depths == 0, 0, codes + first)

    def _log_probs_at(self, states_nd: Tensor, depths: Tensor) -> Tensor:
        """``[n, V]``: `log_probs` of the level at each depth; -inf beyond the level's codes, where V is the largest level's size."""
        found = states_nd.new_full((len(states_nd), max(self.table.level_sizes)), -torch.inf)
        for level, size in enumerate(self.table.level_sizes):
            own = (depths == level).nonzero()[:, 0]
            if len(own):
                found[own, :size] = self.log_probs(states_nd[None, own], level)[0]
        return found

    def event_vectors(self, items: Tensor) -> Tensor:
        """See `Retriever.event_vectors`: the means of the codes' embeddings."""
        return F.embedding_bag(self.tokens[items], self.t5.embedding.weight, mode="mean")

    def carry(self, config: RetrieverEfficiency) -> None:
        """See `Retriever.carry`."""
        self.schedule = placed_schedule(config, self, self.config.layers)
        self.drafts = [] if config.drafts is None else [self._adjacency(config.drafts)]

    def _adjacency(self, config: DraftConfig) -> AdjacencyDraft:
        """What remembers likely successors, level by level; no draft goes deeper than a code's last successor is asked for."""
        sizes = config.level_sizes[: self.table.levels - 1]
        return AdjacencyDraft(max(self.table.level_sizes), config.successors, self.table.levels, sizes)

    def log_probs(self, states_bwd: Tensor, level: int) -> Tensor:
        """``[B, W, V]``: log-probabilities of a level's codes, in the softmax that the model is trained with."""
        log_probs = self._logits(states_bwd, level).log_softmax(-1)
        if self.config.softmax == "level":
            return log_probs
        first = self._first[level]
        return log_probs[..., first : first + self.table.level_sizes[level]]

    def token_of(self, codes: Tensor, level: int) -> Tensor:
        """The tokens of a level's codes."""
        return codes + self._first[level]

    def tokens_of(self, table: CodeTable) -> Tensor:
        """See `CodeRetriever.tokens_of`."""
        return table.codes + torch.tensor(self._first)

    def _logits(self, states: Tensor, level: int) -> Tensor:
        if self.config.softmax == "vocabulary":
            return self.t5.logits(states, slice(None))
        first = self._first[level]
        return self.t5.logits(states, slice(first, first + self.table.level_sizes[level]))

    def _base(self, level: int) -> int:
        """The token that is number 0 of the softmax of a level."""
        return 0 if self.config.softmax == "vocabulary" else self._first[level]

    def _memory(self, items_sl: Tensor, seen_s: Tensor, schedule: PruneSchedule | None = None) -> tuple[Tensor, Tensor]:
        """``[S, 1 + L levels, d]`` and which positions are there, of the first ``seen`` items of each row; fewer under a schedule."""
        there = torch.arange(items_sl.shape[1], device=items_sl.device) < seen_s[:, None]
        tokens = self.tokens[items_sl].masked_fill(~there[..., None], 0).flatten(1)
        tokens = F.pad(tokens, (1, 0))
        if schedule is not None:
            item = torch.arange(tokens.shape[1], device=tokens.device).add(self.table.levels - 1) // self.table.levels  # 0: the start
            return self.t5.encode_some(tokens, 1 + seen_s * self.table.levels, item, schedule)
        valid = F.pad(there.repeat_interleave(self.table.levels, 1), (1, 0), value=True)
        return self.t5.encode(tokens, valid), valid


class _Scorer:
    """The decoder as a `recsys.retrieval.state.PrefixScorer`."""

    def __init__(self, model: TIGER, memory_bsd: Tensor, valid_bs: Tensor) -> None:
        self._model, self._decoder, self._level = model, BeamDecoder(model.t5, memory_bsd, valid_bs), 0

    def step(self, parents_bw: Tensor, codes_bw: Tensor) -> Tensor:
        """See `PrefixScorer.step`."""
        level, device = self._level, self._model.tokens.device
        parents_bw, codes_bw = parents_bw.to(device), codes_bw.to(device)
        if level == self._model.table.levels:
            raise DataError(f"step: all {level} levels are generated already")
        tokens = torch.zeros_like(codes_bw) if level == 0 else self._model.token_of(codes_bw, level - 1)
        self._level += 1
        return self._model.log_probs(self._decoder.advance(parents_bw, tokens), level)
