# SPDX-License-Identifier: Apache-2.0
"""SETRec (SIGIR 2025, arXiv 2502.10833): an item is a set of continuous tokens, and all tokens of the next item come from one pass."""

from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.core import components
from recsys.core.components import component_config, register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError, DataError
from recsys.data.batch import SequenceBatch
from recsys.data.world import average
from recsys.retrieval.base import VectorRetriever, codes_of, require_same_codes
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.efficiency import RetrieverEfficiency
from recsys.retrieval.inheritance import Inheritance, inherited
from recsys.retrieval.item_sets import CodeSet, TextSet
from recsys.retrieval.item_transformers import SetTransformer
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models.sasrec import SASRec
from recsys.retrieval.padding import pad_last, require_known_rows, training_targets
from recsys.retrieval.softmax import catalogue_cross_entropy, sampled_cross_entropy
from recsys.retrieval.state import SlotVectors
from recsys.retrieval.transformer import TransformerConfig


@register("retriever", "setrec")
class SETRec(VectorRetriever):
    """Items as one collaborative and N semantic tokens, generated all at once by n = N + 1 learned queries.

    Follows the paper: e_0 = W x + b on frozen collaborative vectors; semantic tokens of text (`TextSet`); tokens of one item share their
    position and do not see each other; queries see the whole history and not each other; grounding by raw inner products; the loss
    is the mean over slots and targets of cross-entropies plus alpha times the reconstruction error (MSE) of the history's items, the
    catalogue being tokenized anew in each step; slot weights w = [1 - beta, beta, … beta] when ranking. The masks are the intended
    ones, not those of the authors' code (which loses them in T5, and in Qwen under fused attention). The paper's language models are
    backbones (`recsys.retrieval.backbones`), which have a switch for what the authors' code does.

    Differs from it: without a ``backbone``, a small transformer of our own and no instruction text; where the paper starts from
    pretrained weights, `warm_start` takes those of the collaborative model; a query group after every
    prefix instead of one prefix for each sample, with equal results (see `SetTransformer`); a state that has seen nothing attends to
    itself. Items that are not warm have a zero collaborative vector, so that their collaborative term is the same for all of them (or with
    ``inherit`` one of items of like text, without which they are hardly ever found among warm ones),
    and stay out of the training softmax unless ``cold_in_softmax``: as negatives that are never positives they would be pushed down.

    ``negatives`` makes the softmax over a sample of the catalogue, with the logQ correction, slot by slot.

    With ``semantic: codes`` the item tokenizer's codes stand in the place of the continuous tokens (`CodeSet`), slot by slot; the
    collaborative token, the score and the loss stay what they are, but for the reconstruction error, of which there is none.

    Raises:
        ConfigError: ``items`` has no collaborative vectors, or not the text or codes that its semantic tokens are made of.
        DataError: they do not have ``items.count`` rows.
    """

    class Config(TransformerConfig):
        """Besides the `TransformerConfig`, of which only ``max_length`` and ``init_std`` matter where there is a ``backbone``.

        Attributes:
            backbone: a pretrained language model in the place of the small transformer; null for none.
            semantic: what semantic tokens are made of, ``text`` embeddings or the item tokenizer's ``codes``.
            code_digits: of the codes, see `CodeSet`; for FSQ its levels. Null to embed whole codes.
            semantic_tokens: N; of codes, there are as many as levels.
            ae_hidden: hidden widths of the tokenizer's encoder; the decoder mirrors them.
            reconstruction_weight: alpha.
            beta: the weight of each semantic slot; the collaborative slot has 1 - beta. To be chosen on validation data: `SETRec.set_beta`.
            negatives: so many items are drawn evenly for the training softmax of a batch, and only these, the targets and the history's are
                tokenized; null for the whole catalogue.
            inherit: whether items that are not warm inherit a collaborative vector from warm ones of like text; null for zero ones.
            cold_in_softmax: whether items that are not warm are candidates of the training softmax, as in the authors' code.
            compress: whether users and items are compared in the factors that an item's tokens are affine in: the collaborative vector and
                the H values before the tokenizer's last layer. An index then holds ``D_cf + H + 1`` numbers for each item and not ``n d``,
                and gives the same scores. It pays for a wide transformer.
            warm_start: whether the pipeline calls `SETRec.warm_start` with the collaborative model before training.
        """

        name: Literal["setrec"] = "setrec"
        backbone: component_config("set_backbone", optional=True) = None  # type: ignore[valid-type]
        semantic: Literal["text", "codes"] = "text"
        code_digits: tuple[int, ...] | None = None
        semantic_tokens: int = Field(default=4, ge=1)
        ae_hidden: tuple[int, ...] = (512, 256, 128)
        reconstruction_weight: float = Field(default=0.7, ge=0.0)
        beta: float = Field(default=0.5, ge=0.0, le=1.0)
        negatives: int | None = Field(default=None, ge=1)
        inherit: Inheritance | None = None
        cold_in_softmax: bool = False
        compress: bool = False
        warm_start: bool = False

        @model_validator(mode="after")
        def _fits_together(self) -> Self:
            if self.backbone is not None and self.warm_start:
                raise ValueError("warm_start: a backbone starts from weights of its own; expected false")
            if self.semantic == "codes" and self.compress:
                raise ValueError("compress: tokens of codes are not affine in a few factors; expected false")
            if self.semantic == "text" and self.code_digits is not None:
                raise ValueError("code_digits: expected null, since the semantic tokens are made of text")
            return self

    warm: Tensor
    collaborative: Tensor
    carries = frozenset({"schedule"})

    def __init__(self, config: Config, items: ItemTable) -> None:
        super().__init__()
        content, collaborative = _features(items, config)
        backbone = None if config.backbone is None else components.build("set_backbone", config.backbone, config.max_length)
        self.config = config if backbone is None else config.model_copy(update={"backbone": backbone.config})
        self.max_length = config.max_length
        self.beta = config.beta
        self.register_buffer("warm", items.warm.bool().clone())
        self.register_buffer(config.semantic, content)
        self.register_buffer("collaborative", collaborative)
        dim = config.dim if backbone is None else backbone.dim
        self.collaborative_token = nn.Linear(collaborative.shape[1], dim)
        nn.init.xavier_normal_(self.collaborative_token.weight)
        nn.init.zeros_(self.collaborative_token.bias)
        self.table = items.codes if config.semantic == "codes" else None
        self.semantic = _semantic(config, content, self.table, dim)
        self.slots = self.semantic.tokens + 1
        self.queries = nn.Parameter(torch.randn(self.slots, dim) * config.init_std)
        self.transformer = SetTransformer(config) if backbone is None else backbone
        self.take_efficiency(config.efficiency)

    @property
    def scorable(self) -> Tensor:
        """bool ``[N]``: all items, since a new one has tokens as soon as it has text or codes."""
        return torch.ones_like(self.warm)

    @property
    def content(self) -> Tensor:
        """What semantic tokens are made of, by catalogue row: text ``[N, D_text]``, or codes int64 ``[N, K]``."""
        content: Tensor = getattr(self, self.config.semantic)
        return content

    @classmethod
    def reads_codes(cls, config: BaseConfig) -> bool:
        """See `Retriever.reads_codes`."""
        assert isinstance(config, cls.Config)
        return config.semantic == "codes"

    def tokenize(self, content: Tensor, collaborative: Tensor) -> Tensor:
        """``[M, n, d]``: the sets of items, collaborative token first, of text ``[M, D_text]`` or codes ``[M, N]``, and ``[M, D_cf]``."""
        return torch.cat((self.collaborative_token(collaborative)[:, None], self.semantic(content)), 1)

    def loss(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over slots and targets of cross-entropies over the candidates or a sample, plus alpha times the reconstruction error.

        The candidates are the warm items, or all with ``cold_in_softmax``; a target that is no candidate is left out.

        Raises:
            DataError: no targets, a row longer than ``max_length``, or a target outside its history.
            CannotScoreNewItems: a row beyond the catalogue; see `replace_items`.
        """
        require_known_rows(batch, len(self.warm))
        candidates = torch.ones_like(self.warm) if self.config.cold_in_softmax else self.warm
        targets, states = training_targets(batch, self.max_length, known=candidates)
        drawn = self._drawn(candidates)
        tokens_und, place = self._tokenized(batch.items, targets, drawn)
        seen, column = states.padded(len(batch))
        hidden_snd = self._states(SequenceBatch(place[batch.items], batch.offsets), tokens_und, seen)[states.row, column]
        if drawn is None:
            rank = candidates.cumsum(0) - 1
            losses = catalogue_cross_entropy(hidden_snd, tokens_und[candidates], rank[targets], states.of_target)
        else:
            evenly = tokens_und.new_full((len(tokens_und),), 1.0 / int(candidates.sum()))
            losses = _sampled(hidden_snd, tokens_und, place[targets], states.of_target, place[drawn], evenly)
        cross_entropy = losses.mean()
        if not isinstance(self.semantic, TextSet):
            return cross_entropy, {"cross_entropy": cross_entropy.detach()}
        history = batch.items.unique()
        reconstruction = self._reconstruction(self.semantic, tokens_und[place[history], 1:], history)
        loss = cross_entropy + self.config.reconstruction_weight * reconstruction
        return loss, {"cross_entropy": cross_entropy.detach(), "reconstruction": reconstruction.detach()}

    def encode(self, batch: SequenceBatch) -> SlotVectors:
        """The n slot vectors after the last ``max_length`` events of each row, times the slot weights: ``[B, n, d]``.

        With ``compress`` a single one in the space of the factors, ``[B, 1, D_cf + H + 1]``.

        Raises:
            CannotScoreNewItems: a row beyond the catalogue; see `replace_items`.
        """
        require_known_rows(batch, len(self.warm))
        batch = self.pruned(batch)
        rows, inverse = batch.items.unique(return_inverse=True)
        used = SequenceBatch(inverse, batch.offsets)
        tokens_und = self.tokenize(self.content[rows], self.collaborative[rows])
        history_blnd, lengths = self._histories(used, tokens_und)
        states_bnd = self.transformer.last(history_blnd, self.queries, lengths) * self.slot_weights()[:, None]
        compressing = self._compressing()
        return SlotVectors(states_bnd if compressing is None else self._compressed(compressing, states_bnd)[:, None])

    def event_vectors(self, items: Tensor) -> Tensor:
        """See `Retriever.event_vectors`: the concatenated tokens."""
        rows, inverse = items.unique(return_inverse=True)
        return self.tokenize(self.content[rows], self.collaborative[rows]).flatten(1)[inverse]

    def carry(self, config: RetrieverEfficiency) -> None:
        """See `Retriever.carry`; a schedule is for the small transformer.

        Raises:
            ConfigError: there is a backbone in its place, or the schedule does not fit.
        """
        if isinstance(self.transformer, SetTransformer):
            self.transformer.take_efficiency(config)
        elif config.schedule is not None:
            raise ConfigError(f"efficiency: schedule: a backbone cannot carry it, got {self.config.backbone.name!r}; expected null")

    def item_vectors(self) -> Tensor:
        """float ``[N, n * d]``: the concatenated tokens of all catalogue rows; with ``compress`` their factors and a 1."""
        if (compressing := self._compressing()) is not None:
            return F.pad(torch.cat((self.collaborative, compressing.factors(self.content)), 1), (0, 1), value=1.0)
        return self.tokenize(self.content, self.collaborative).flatten(1)

    def slot_weights(self) -> Tensor:
        """``[n]``: w = [1 - beta, beta, … beta]."""
        weights = self.queries.new_full((self.slots,), self.beta)
        weights[0] = 1.0 - self.beta
        return weights

    def set_beta(self, beta: float) -> None:
        """Choose the weight of the semantic slots, 0 (collaborative only) to 1 (semantic only); no vector of an item changes."""
        if not 0.0 <= beta <= 1.0:
            raise ConfigError(f"beta: expected 0 to 1, got {beta!r}")
        self.beta = float(beta)

    @torch.no_grad()
    def warm_start(self, collaborative: SASRec) -> None:
        """Begin where the collaborative model ended, as the paper begins with a pretrained language model.

        Takes over its transformer; its space for the collaborative tokens (W = 1, b = 0); and its start token, which every query is
        added to. The semantic tokens and what tells the queries apart stay as they were drawn.

        Raises:
            ConfigError: the two transformers have other sizes.
        """
        for field in ("dim", "blocks", "heads", "ffn_multiplier", "max_length"):
            ours, theirs = getattr(self.config, field), getattr(collaborative.config, field)
            if ours != theirs:
                raise ConfigError(f"setrec: warm_start: {field}: expected {theirs} as in the collaborative model, got {ours}")
        theirs = collaborative.transformer.state_dict()
        self.transformer.load_state_dict({name: theirs[name] for name in self.transformer.state_dict()})
        nn.init.eye_(self.collaborative_token.weight)
        nn.init.zeros_(self.collaborative_token.bias)
        self.queries.add_(collaborative.start)

    def replace_items(self, items: ItemTable) -> None:
        """Take another catalogue, such as one with new items appended, without training.

        Raises:
            ConfigError: a feature is absent.
            DataError: a feature has another width than the one the model was built with, or the codes are of another tokenizer.
        """
        content, collaborative = _features(items, self.config)
        if self.table is not None:
            self.table = require_same_codes(self.table, codes_of(self, items))
        for name, present, new in ((self.config.semantic, self.content, content), ("collaborative", self.collaborative, collaborative)):
            if present.shape[1] != new.shape[1]:
                raise DataError(f"items.{name}: expected {present.shape[1]} columns as in training, got {new.shape[1]}")
        self.warm = items.warm.bool().to(self.warm.device)
        setattr(self, self.config.semantic, content.to(self.content))
        self.collaborative = collaborative.to(self.collaborative)

    def extra_state(self) -> dict[str, Any]:
        """The beta in use."""
        return {"beta": self.beta}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `extra_state` returned."""
        self.set_beta(state["beta"])

    def _states(self, batch: SequenceBatch, tokens_cnd: Tensor, seen_bp: Tensor) -> Tensor:
        """``[B, P, n, d]``: the query outputs of the states; ``batch.items`` are rows of ``tokens_cnd``."""
        outputs: Tensor = self.transformer(self._histories(batch, tokens_cnd)[0], self.queries, seen_bp)
        return outputs

    def _histories(self, batch: SequenceBatch, tokens_cnd: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, L, n, d]``: the tokens of the last ``max_length`` items of each row; and how many it has, int64 ``[B]``."""
        padded, lengths = pad_last(batch, self.max_length)
        return F.embedding(padded, tokens_cnd.flatten(1)).unflatten(-1, (self.slots, -1)), lengths

    def _compressing(self) -> TextSet | None:
        """The set whose factors take the place of tokens, where that is asked for."""
        return self.semantic if self.config.compress and isinstance(self.semantic, TextSet) else None

    def _compressed(self, semantic: TextSet, states_bnd: Tensor) -> Tensor:
        """``[B, D_cf + H + 1]``: the maps from factors to tokens, taken to the side of the user.

        ``Σ_k ⟨q_k, A_k h + b_k⟩ = ⟨Σ_k A_kᵀ q_k, h⟩ + Σ_k ⟨q_k, b_k⟩``, and likewise for the collaborative token.
        """
        first, rest = states_bnd[:, 0], states_bnd[:, 1:]
        weight_ndh, bias_nd = semantic.last()
        constant = first @ self.collaborative_token.bias + (rest * bias_nd).sum((1, 2))
        factors = torch.einsum("bnd,ndh->bh", rest, weight_ndh)
        return torch.cat((first @ self.collaborative_token.weight, factors, constant[:, None]), 1)

    def _drawn(self, candidates: Tensor) -> Tensor | None:
        """int64 ``[negatives]``: catalogue rows, drawn evenly from the candidates; None for all of them."""
        if self.config.negatives is None:
            return None
        rows = candidates.nonzero()[:, 0]
        return rows[torch.randint(len(rows), (self.config.negatives,), device=rows.device)]

    def _tokenized(self, items: Tensor, targets: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[U, n, d]``: the sets of all items, or those that a sample needs; and int64 ``[N]``, where each catalogue row's set stands."""
        if drawn is None:
            return self.tokenize(self.content, self.collaborative), torch.arange(len(self.warm), device=self.warm.device)
        used = torch.zeros_like(self.warm)
        used[torch.cat((items, targets, drawn))] = True
        return self.tokenize(self.content[used], self.collaborative[used]), used.cumsum(0) - 1

    def _reconstruction(self, semantic: TextSet, tokens_und: Tensor, rows: Tensor) -> Tensor:
        """MSE between the text embeddings of U ``rows`` and what their semantic tokens say of them; zero where there are no rows.

        Where several processes train, the rows are those that any of them has; one that several have is shared between them.
        """
        present = average(torch.zeros(len(self.warm), device=self.warm.device).index_fill_(0, rows, 1.0))
        errors = F.mse_loss(semantic.reconstruct(tokens_und), self.content[rows], reduction="none").mean(1)
        return (errors / present[rows]).sum() / present.count_nonzero().clamp(min=1)


def alignment(collaborative: Tensor, histories: SequenceBatch) -> float:
    """How much more alike the collaborative vectors of successive items are than those of random pairs.

    Collaborative vectors place items that follow each other near each other. A table that is off by a row (as the one that came with
    the authors' code is) yields about 0, a right one clearly more. Cosines are taken after subtracting the mean; rows of zeros, which
    stand for items without a vector, are left out. The mean over random pairs is exact: the inner product of the mean directions.

    Args:
        collaborative: float ``[N, D_cf]``.
        histories: items that are rows of ``collaborative``; targets are not used.

    Returns:
        The mean cosine of successive items minus that of random pairs.

    Raises:
        DataError: no two successive items have vectors.
    """
    present = collaborative.abs().sum(1) > 0
    centred = F.normalize(collaborative - collaborative[present].mean(0), dim=1)
    rows = torch.repeat_interleave(torch.arange(len(histories), device=histories.items.device), histories.lengths)
    left, right = histories.items[:-1], histories.items[1:]
    pairs = (rows[:-1] == rows[1:]) & present[left] & present[right]
    if not bool(pairs.any()):
        raise DataError("alignment: no history has two successive items with collaborative vectors")
    before, after = centred[left[pairs]], centred[right[pairs]]
    return float((before * after).sum(1).mean() - before.mean(0) @ after.mean(0))


def _sampled(states_snd: Tensor, items_und: Tensor, targets: Tensor, of_target: Tensor, drawn: Tensor, probability_u: Tensor) -> Tensor:
    """`sampled_cross_entropy` of every slot, ``[n]``."""
    slots = zip(states_snd.unbind(1), items_und.unbind(1), strict=True)
    return torch.stack([sampled_cross_entropy(own, items, targets, of_target, drawn, probability_u) for own, items in slots])


def _semantic(config: SETRec.Config, content: Tensor, codes: CodeTable | None, dim: int) -> TextSet | CodeSet:
    if codes is None:
        return TextSet(content.shape[1], config.ae_hidden, config.semantic_tokens, dim)
    return CodeSet(codes.level_sizes, dim, config.code_digits, config.init_std)


def _features(items: ItemTable, config: SETRec.Config) -> tuple[Tensor, Tensor]:
    """What semantic tokens are made of, and the collaborative vectors: of items that are not warm zero, or inherited."""
    semantic = config.semantic
    content = items.text if semantic == "text" else None if items.codes is None else items.codes.codes
    if content is None:
        how = "text embeddings of the items, got None (recsys.text encodes them)" if semantic == "text" else "codes of the items, got None"
        raise ConfigError(f"setrec: items.{semantic}: expected {how}")
    if items.collaborative is None:
        raise ConfigError("setrec: items.collaborative: expected vectors of a collaborative model, got None (train a sasrec first)")
    for name, rows in (("warm", items.warm), (semantic, content), ("collaborative", items.collaborative)):
        if len(rows) != items.count:
            raise DataError(f"setrec: items.{name}: expected count={items.count} rows, got {len(rows)}")
    collaborative = items.collaborative.detach() * items.warm.bool()[:, None]
    if config.inherit is not None:
        if items.text is None or len(items.text) != items.count:
            raise ConfigError("setrec: inherit: expected text embeddings of all items, by which they are alike (recsys.text encodes them)")
        collaborative = inherited(collaborative, items.warm.bool(), items.text.detach(), config.inherit)
    return content.detach().clone(), collaborative
