# SPDX-License-Identifier: Apache-2.0
"""RecGPT (EMNLP 2025, arXiv 2506.06270): codes of item text, so that a model trained on some catalogues recommends in another."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.errors import ConfigError, DataError
from recsys.data.batch import SequenceBatch
from recsys.retrieval.base import CodeRetriever
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.efficiency import RetrieverEfficiency
from recsys.retrieval.item_sets import code_digits
from recsys.retrieval.item_transformers import HybridTransformer
from recsys.retrieval.items import ItemTable
from recsys.retrieval.padding import known_histories, training_targets
from recsys.retrieval.softmax import catalogue_cross_entropy
from recsys.retrieval.state import SlotLogProbs
from recsys.retrieval.transformer import TransformerConfig


@register("retriever", "recgpt")
class RecGPT(CodeRetriever):
    """A decoder over K tokens for each item, from whose K states all K codes of the next item are predicted at once.

    Follows the authors' code where it says more than the paper. Token k of an item is ``LN(W_aux f_k) + LN(E[c_k])`` and its position, with
    f_k the k-th slice of the item's text embedding: what quantisation lost comes in beside the code. Tokens see all tokens of their own
    item and of those before it. One table of codes and one head serve all slots. The loss is the mean of the codes' cross-entropies; an
    item's score is the sum of its codes' log-probabilities at a ``temperature``, on which exact lists do not depend.

    Differs from it: positions count from the first item of the window whatever the batch (there, left padding moves a user's positions
    by the length of its batch mates); a position is that of the item plus that of the slot; a learned group of K tokens stands before
    the first item, so that an empty history has a state and the first item is predicted too; the table has as many rows as there are
    codes (there, GPT-2's 50,257); items that share all codes are all returned; lists are exact, with the published search beside them
    (`recsys.retrieval.catalogue.BeamIndex` with the widths (10, 20, 20, 20) and 5 children).

    Raises:
        ConfigError: the items have no codes or no text, the levels have different sizes, the digits write another number of codes, or the
            text does not divide into K slices.
    """

    class Config(TransformerConfig):
        """Besides the `TransformerConfig`.

        Attributes:
            bidirectional: whether a token sees the later tokens of its own item (the paper's ablation).
            auxiliary: whether the text's slices come in beside the codes (the paper's ablation).
            temperature: of the codes' probabilities when lists are made.
            code_digits: codes are written in so many values for each digit (see `recsys.retrieval.item_sets.code_digits`; for FSQ its
                levels), and a code's vector, read and predicted, is the sum of its digits': neighbours on the grid share what is learnt
                of them. Null, as in the paper, for a vector of its own for each code.
        """

        name: Literal["recgpt"] = "recgpt"
        dim: int = Field(768, ge=1)
        blocks: int = Field(3, ge=1)
        heads: int = Field(12, ge=1)
        ffn_multiplier: int = Field(4, ge=1)
        dropout: float = Field(0.1, ge=0.0, lt=1.0)
        bidirectional: bool = True
        auxiliary: bool = True
        temperature: float = Field(0.1, gt=0)
        code_digits: tuple[int, ...] | None = None

    digits: Tensor | None
    text: Tensor
    carries = frozenset({"schedule"})
    equal_levels: ClassVar[bool] = True

    def __init__(self, config: Config, items: ItemTable) -> None:
        super().__init__(items)
        self.config, self.max_length = config, config.max_length
        self.slots, self.codes = self.table.levels, self.table.level_sizes[0]
        self.register_buffer(
            "digits", None if config.code_digits is None else code_digits(self.codes, config.code_digits), persistent=False
        )
        vectors = self.codes if config.code_digits is None else sum(config.code_digits)
        self.embedding = nn.Embedding(vectors, config.dim)
        self.token_norm = nn.LayerNorm(config.dim)
        self.slot = nn.Parameter(torch.randn(self.slots, config.dim) * config.init_std)
        self.start = nn.Parameter(torch.randn(self.slots, config.dim) * config.init_std)
        self.transformer = HybridTransformer(config)
        self.head = nn.Parameter(torch.randn(vectors, config.dim) * config.init_std)
        nn.init.normal_(self.embedding.weight, std=config.init_std)
        if config.auxiliary:
            text = self._text_of(items)
            self.aux, self.aux_norm = nn.Linear(text.shape[2], config.dim, bias=False), nn.LayerNorm(config.dim)
            nn.init.normal_(self.aux.weight, std=config.init_std)
            self.register_buffer("text", text, persistent=False)
        self._take_codes()
        self.take_efficiency(config.efficiency)

    def loss(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over targets and slots of cross-entropies over all codes.

        Raises:
            DataError: no targets, a row longer than ``max_length``, or a target outside its history.
            CannotScoreNewItems: a row without codes.
        """
        padded, lengths = known_histories(batch, self.max_length, len(self.tokens))
        targets, states = training_targets(batch, self.max_length, known=None)
        hidden_skd = self._states(padded, lengths)[states.row, states.position]
        slot = torch.arange(self.slots, device=targets.device)
        of_target = (states.of_target[:, None] * self.slots + slot).flatten()
        head_vd = self._by_code(self.head)
        (loss,) = catalogue_cross_entropy(hidden_skd.flatten(0, 1)[:, None], head_vd[:, None], self.tokens[targets].flatten(), of_target)
        return loss, {"cross_entropy": loss.detach()}

    def encode(self, batch: SequenceBatch) -> SlotLogProbs:
        """The codes' log-probabilities after the last ``max_length`` events of each row: ``[B, K, V]``.

        Raises:
            CannotScoreNewItems: a row without codes.
        """
        padded, lengths = known_histories(self.pruned(batch), self.max_length, len(self.tokens))
        last_bkd = self.transformer.last(self._groups(padded), lengths + 1, self.config.bidirectional)
        with torch.autocast(last_bkd.device.type, enabled=False):
            logits = last_bkd.to(self.head.dtype) @ self._by_code(self.head).T
            return SlotLogProbs((logits / self.config.temperature).log_softmax(-1), self.table.tokenizer)

    def carry(self, config: RetrieverEfficiency) -> None:
        """See `Retriever.carry`."""
        self.transformer.take_efficiency(config)

    def event_vectors(self, items: Tensor) -> Tensor:
        """See `Retriever.event_vectors`: what the transformer reads of each item, its slots beside one another."""
        return self._item_tokens(items).flatten(1)

    def tokens_of(self, table: CodeTable) -> Tensor:
        """See `CodeRetriever.tokens_of`: one table serves all slots."""
        return table.codes

    def replace_items(self, items: ItemTable) -> None:
        """See `CodeRetriever.replace_items`.

        Raises:
            ConfigError: the items have no codes or no text.
            DataError: the codes are of another tokenizer, or the text has another width.
        """
        text = self._text_of(items) if self.config.auxiliary else None
        if text is not None and text.shape[1:] != self.text.shape[1:]:
            raise DataError(f"items.text: expected {self.text[0].numel()} columns as in training, got {text[0].numel()}")
        super().replace_items(items)
        if text is not None:
            self.text = text.to(self.text)

    def _text_of(self, items: ItemTable) -> Tensor:
        """``[N, K, D_text / K]``."""
        if items.text is None or items.text.shape[1] % self.slots:
            got = "none" if items.text is None else f"a width of {items.text.shape[1]}"
            raise ConfigError(f"recgpt: expected text embeddings of a width that {self.slots} slots divide, got {got}")
        slices: Tensor = items.text.unflatten(1, (self.slots, -1))
        return slices

    def _item_tokens(self, items: Tensor) -> Tensor:
        """``[…, K, d]`` of items ``[…]``: the embedded codes and the auxiliary text stream."""
        tokens: Tensor = self.token_norm(F.embedding(self.tokens[items], self._by_code(self.embedding.weight)))
        if self.config.auxiliary:
            tokens = tokens + self.aux_norm(self.aux(self.text[items]))
        return tokens

    def _by_code(self, vectors: Tensor) -> Tensor:
        """``[V, d]``: of each code, from vectors of codes or of digits."""
        return vectors if self.digits is None else F.embedding_bag(self.digits, vectors, mode="sum")

    def _states(self, padded_bl: Tensor, lengths_b: Tensor) -> Tensor:
        """``[B, L + 1, K, d]``: the states after 0, 1, … L items, of which each row has ``lengths_b``."""
        states: Tensor = self.transformer(self._groups(padded_bl), lengths_b + 1, self.config.bidirectional)
        return states

    def _groups(self, padded_bl: Tensor) -> Tensor:
        """``[B, L + 1, K, d]``: the start group and the items' tokens."""
        start = self.start.expand(len(padded_bl), 1, -1, -1)
        return torch.cat((start, self._item_tokens(padded_bl)), 1) + self.slot
