# SPDX-License-Identifier: Apache-2.0
"""SETRec (SIGIR 2025, arXiv 2502.10833): an item is a set of continuous tokens, and all tokens of the next item come from one pass."""

from itertools import pairwise
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.errors import ConfigError, DataError
from recsys.data.batch import SequenceBatch
from recsys.retrieval.base import VectorRetriever
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models.sasrec import SASRec
from recsys.retrieval.padding import pad_last, require_known_rows, training_targets
from recsys.retrieval.softmax import catalogue_cross_entropy
from recsys.retrieval.state import SlotVectors
from recsys.retrieval.transformer import SetTransformer, TransformerConfig


class SemanticTokenizer(nn.Module):
    """One autoencoder that turns an item's text embedding f into N semantic tokens: e_1..e_N = reshape(Enc(f)), f̂ = Dec(Enc(f)).

    ReLU between the layers and none after the last, a mirror-image decoder, Xavier-normal weights, as in the authors' code.
    """

    def __init__(self, text_dim: int, hidden: tuple[int, ...], tokens: int, dim: int) -> None:
        super().__init__()
        self.tokens = tokens
        widths = (text_dim, *hidden, tokens * dim)
        self.encoder = _mlp(widths)
        self.decoder = _mlp(widths[::-1])

    def forward(self, text: Tensor) -> Tensor:
        """``[M, D_text]`` to the tokens ``[M, N, d]``."""
        tokens: Tensor = self.encoder(text).unflatten(-1, (self.tokens, -1))
        return tokens

    def factors(self, text: Tensor) -> Tensor:
        """``[M, D_text]`` to what the last layer reads, ``[M, H]``: all tokens of an item are affine in it."""
        hidden: Tensor = self.encoder[:-1](text)
        return hidden

    def last(self) -> tuple[Tensor, Tensor]:
        """Weight ``[N, d, H]`` and bias ``[N, d]`` of the last layer, token by token."""
        layer = cast(nn.Linear, self.encoder[-1])
        return layer.weight.unflatten(0, (self.tokens, -1)), layer.bias.unflatten(0, (self.tokens, -1))

    def reconstruct(self, tokens_mnd: Tensor) -> Tensor:
        """The tokens ``[M, N, d]`` back to text embeddings ``[M, D_text]``."""
        text: Tensor = self.decoder(tokens_mnd.flatten(1))
        return text


def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        linear = nn.Linear(before, after)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@register("retriever", "setrec")
class SETRec(VectorRetriever):
    """Items as one collaborative and N semantic tokens, generated all at once by n = N + 1 learned queries.

    Follows the paper: e_0 = W x + b on frozen collaborative vectors; the semantic tokenizer above; tokens of one item share their
    position and do not see each other; queries see the whole history and not each other; grounding by raw inner products; the loss
    is the mean over slots and targets of cross-entropies plus alpha times the reconstruction error (MSE) of the history's items, the
    catalogue being tokenized anew in each step; slot weights w = [1 - beta, beta, … beta] when ranking. The masks are the intended
    ones, not those of the authors' code (which loses them in T5, and in Qwen under fused attention).

    Differs from it: a small transformer of our own instead of a language model, hence no instruction text; where the paper starts from
    pretrained weights, `warm_start` takes those of the collaborative model; a query group after every
    prefix instead of one prefix for each sample, with equal results (see `SetTransformer`); a state that has seen nothing attends to
    itself. Items that are not warm have a zero collaborative vector, so that their collaborative term is the same for all of them,
    and stay out of the training softmax unless ``cold_in_softmax``: as negatives that are never positives they would be pushed down.

    Raises:
        ConfigError: ``items`` has no text or no collaborative vectors.
        DataError: they do not have ``items.count`` rows.
    """

    class Config(TransformerConfig):
        """Besides the `TransformerConfig`.

        Attributes:
            semantic_tokens: N.
            ae_hidden: hidden widths of the tokenizer's encoder; the decoder mirrors them.
            reconstruction_weight: alpha.
            beta: the weight of each semantic slot; the collaborative slot has 1 - beta. To be chosen on validation data: `SETRec.set_beta`.
            cold_in_softmax: whether items that are not warm are candidates of the training softmax, as in the authors' code.
            compress: whether users and items are compared in the factors that an item's tokens are affine in: the collaborative vector and
                the H values before the tokenizer's last layer. An index then holds ``D_cf + H + 1`` numbers for each item and not ``n d``,
                and gives the same scores. It pays for a wide transformer.
            warm_start: whether the pipeline calls `SETRec.warm_start` with the collaborative model before training.
        """

        name: Literal["setrec"] = "setrec"
        semantic_tokens: int = Field(default=4, ge=1)
        ae_hidden: tuple[int, ...] = (512, 256, 128)
        reconstruction_weight: float = Field(default=0.7, ge=0.0)
        beta: float = Field(default=0.5, ge=0.0, le=1.0)
        cold_in_softmax: bool = False
        compress: bool = False
        warm_start: bool = False

    warm: Tensor
    text: Tensor
    collaborative: Tensor

    def __init__(self, config: Config, items: ItemTable) -> None:
        super().__init__()
        text, collaborative = _features(items)
        self.config = config
        self.max_length = config.max_length
        self.slots = config.semantic_tokens + 1
        self.beta = config.beta
        self.register_buffer("warm", items.warm.bool().clone())
        self.register_buffer("text", text)
        self.register_buffer("collaborative", collaborative)
        self.collaborative_token = nn.Linear(collaborative.shape[1], config.dim)
        nn.init.xavier_normal_(self.collaborative_token.weight)
        nn.init.zeros_(self.collaborative_token.bias)
        self.semantic = SemanticTokenizer(text.shape[1], config.ae_hidden, config.semantic_tokens, config.dim)
        self.queries = nn.Parameter(torch.randn(self.slots, config.dim) * config.init_std)
        self.transformer = SetTransformer(config)

    @property
    def scorable(self) -> Tensor:
        """bool ``[N]``: all items, since a new one has tokens as soon as it has text."""
        return torch.ones_like(self.warm)

    def tokenize(self, text: Tensor, collaborative: Tensor) -> Tensor:
        """The token sets of items: ``[M, D_text]`` and ``[M, D_cf]`` to ``[M, n, d]``, the collaborative token first."""
        return torch.cat((self.collaborative_token(collaborative)[:, None], self.semantic(text)), 1)

    def loss(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over slots and targets of cross-entropies over the candidates, plus alpha times the reconstruction error.

        The candidates are the warm items, or all with ``cold_in_softmax``; a target that is no candidate is left out.

        Raises:
            DataError: no targets, a row longer than ``max_length``, or a target outside its history.
            CannotScoreNewItems: a row beyond the catalogue; see `replace_items`.
        """
        require_known_rows(batch, len(self.warm))
        candidates = torch.ones_like(self.warm) if self.config.cold_in_softmax else self.warm
        targets, states = training_targets(batch, self.max_length, known=candidates)
        tokens_cnd = self.tokenize(self.text, self.collaborative)
        seen, column = states.padded(len(batch))
        hidden_snd = self._states(batch, tokens_cnd, seen)[states.row, column]
        rank = candidates.cumsum(0) - 1
        cross_entropy = catalogue_cross_entropy(hidden_snd, tokens_cnd[candidates], rank[targets], states.of_target).mean()
        reconstruction = self._reconstruction(tokens_cnd, batch.items.unique())
        loss = cross_entropy + self.config.reconstruction_weight * reconstruction
        return loss, {"cross_entropy": cross_entropy.detach(), "reconstruction": reconstruction.detach()}

    def encode(self, batch: SequenceBatch) -> SlotVectors:
        """The n slot vectors after the last ``max_length`` events of each row, times the slot weights: ``[B, n, d]``.

        With ``compress`` a single one in the space of the factors, ``[B, 1, D_cf + H + 1]``.

        Raises:
            CannotScoreNewItems: a row beyond the catalogue; see `replace_items`.
        """
        require_known_rows(batch, len(self.warm))
        rows, inverse = batch.items.unique(return_inverse=True)
        used = SequenceBatch(inverse, batch.offsets)
        tokens_und = self.tokenize(self.text[rows], self.collaborative[rows])
        seen = batch.lengths.clamp(max=self.max_length)[:, None]
        states_bnd = self._states(used, tokens_und, seen)[:, 0] * self.slot_weights()[:, None]
        return SlotVectors(self._compressed(states_bnd)[:, None] if self.config.compress else states_bnd)

    def item_vectors(self) -> Tensor:
        """float ``[N, n * d]``: the concatenated tokens of all catalogue rows; with ``compress`` their factors and a 1."""
        if self.config.compress:
            return F.pad(torch.cat((self.collaborative, self.semantic.factors(self.text)), 1), (0, 1), value=1.0)
        return self.tokenize(self.text, self.collaborative).flatten(1)

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
        self.transformer.load_state_dict(collaborative.transformer.state_dict())
        nn.init.eye_(self.collaborative_token.weight)
        nn.init.zeros_(self.collaborative_token.bias)
        self.queries.add_(collaborative.start)

    def replace_items(self, items: ItemTable) -> None:
        """Take another catalogue, such as one with new items appended, without training.

        Raises:
            ConfigError: a feature is absent.
            DataError: a feature has another width than the one the model was built with.
        """
        text, collaborative = _features(items)
        for name, present, new in (("text", self.text, text), ("collaborative", self.collaborative, collaborative)):
            if present.shape[1] != new.shape[1]:
                raise DataError(f"items.{name}: expected {present.shape[1]} columns as in training, got {new.shape[1]}")
        self.warm = items.warm.bool().to(self.warm.device)
        self.text, self.collaborative = text.to(self.text), collaborative.to(self.collaborative)

    def extra_state(self) -> dict[str, Any]:
        """The beta in use."""
        return {"beta": self.beta}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `extra_state` returned."""
        self.set_beta(state["beta"])

    def _states(self, batch: SequenceBatch, tokens_cnd: Tensor, seen_bp: Tensor) -> Tensor:
        """``[B, P, n, d]``: the query outputs of the states; ``batch.items`` are rows of ``tokens_cnd``."""
        padded, _ = pad_last(batch, self.max_length)
        history_blnd = F.embedding(padded, tokens_cnd.flatten(1)).unflatten(-1, (self.slots, -1))
        outputs: Tensor = self.transformer(history_blnd, self.queries, seen_bp)
        return outputs

    def _compressed(self, states_bnd: Tensor) -> Tensor:
        """``[B, D_cf + H + 1]``: the maps from factors to tokens, taken to the side of the user.

        ``Σ_k ⟨q_k, A_k h + b_k⟩ = ⟨Σ_k A_kᵀ q_k, h⟩ + Σ_k ⟨q_k, b_k⟩``, and likewise for the collaborative token.
        """
        first, rest = states_bnd[:, 0], states_bnd[:, 1:]
        weight_ndh, bias_nd = self.semantic.last()
        constant = first @ self.collaborative_token.bias + (rest * bias_nd).sum((1, 2))
        factors = torch.einsum("bnd,ndh->bh", rest, weight_ndh)
        return torch.cat((first @ self.collaborative_token.weight, factors, constant[:, None]), 1)

    def _reconstruction(self, tokens_cnd: Tensor, rows: Tensor) -> Tensor:
        """MSE between the text embeddings of ``rows`` and their reconstructions; zero where there are no rows."""
        if not len(rows):
            return tokens_cnd.new_zeros(())
        return F.mse_loss(self.semantic.reconstruct(tokens_cnd[rows, 1:]), self.text[rows])


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


def _features(items: ItemTable) -> tuple[Tensor, Tensor]:
    """The text embeddings, and the collaborative vectors with zero rows for items that are not warm."""
    if items.text is None:
        raise ConfigError("setrec: items.text: expected text embeddings of the items, got None (recsys.text encodes them)")
    if items.collaborative is None:
        raise ConfigError("setrec: items.collaborative: expected vectors of a collaborative model, got None (train a sasrec first)")
    for name, rows in (("warm", items.warm), ("text", items.text), ("collaborative", items.collaborative)):
        if len(rows) != items.count:
            raise DataError(f"setrec: items.{name}: expected count={items.count} rows, got {len(rows)}")
    return items.text.detach().clone(), items.collaborative.detach() * items.warm.bool()[:, None]
