# SPDX-License-Identifier: Apache-2.0
"""The encoder-decoder transformer of T5 (Raffel et al., arXiv 1910.10683, version 1.0), with a decoder whose beams share their memory.

The same weights as transformers' ``T5ForConditionalGeneration`` (`load_transformers`), with the same results. What differs is the
decoding: keys and values of the encoded history are computed once for each user and read by all of its beams as the queries of one
attention, where they are usually repeated for every beam.
"""

from collections.abc import Mapping
from math import log
from typing import Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.core.config import Config
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.schedule import ProbedLayer, PruneSchedule
from recsys.efficiency.view import TokenView, held, to_padded
from recsys.retrieval.efficiency import RetrieverEfficiency
from recsys.retrieval.transformer import last_queries


class T5Config(Config):
    """Size and regularisation; the defaults are TIGER's (arXiv 2305.05065, §4.1).

    Attributes:
        dim: width d of the residual stream.
        layers: of the encoder, and as many of the decoder.
        heads: of the attention.
        head_dim: width e of a head; ``heads * head_dim`` need not be ``dim``.
        ffn: hidden width of the feed-forward layers.
        dropout: on embeddings, feed-forward layers and what each sub-layer adds.
        buckets: of relative positions.
        max_distance: beyond which all positions fall into the last bucket.
        efficiency: how the retriever spends less; null to spend everything.
    """

    dim: int = Field(128, ge=1)
    layers: int = Field(4, ge=1)
    heads: int = Field(6, ge=1)
    head_dim: int = Field(64, ge=1)
    ffn: int = Field(1024, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    buckets: int = Field(32, ge=4, multiple_of=4)
    max_distance: int = Field(128, ge=2)
    efficiency: RetrieverEfficiency | None = None

    @model_validator(mode="after")
    def _distances_beyond_the_exact_buckets(self) -> Self:
        if self.max_distance <= self.buckets // 2:
            raise ValueError(f"max_distance: expected more than half of buckets={self.buckets}, got {self.max_distance}")
        return self


class RelativeBias(nn.Module):
    """A bias for each head by the bucket of the distance between query and key: exact for small ones, logarithmic beyond.

    Args:
        config: sizes.
        causal: all buckets are for keys before the query; else half of them for keys after it.
    """

    def __init__(self, config: T5Config, causal: bool) -> None:
        super().__init__()
        self._causal, self._buckets, self._max = causal, config.buckets, config.max_distance
        self.table = nn.Embedding(config.buckets, config.heads)
        nn.init.normal_(self.table.weight, std=config.dim**-0.5)

    def forward(self, queries_t: Tensor, keys_s: Tensor) -> Tensor:
        """int64 positions ``[T]`` and ``[S]`` to ``[H, T, S]``; or of rows, ``[B, T]`` and ``[B, S]`` to ``[B, H, T, S]``."""
        bias: Tensor = self.table(self._bucket(keys_s[..., None, :] - queries_t[..., :, None]))
        return bias.movedim(-1, -3)

    def _bucket(self, offset: Tensor) -> Tensor:
        buckets, found = self._buckets, torch.zeros_like(offset)
        if self._causal:
            distance = (-offset).clamp(min=0)
        else:
            buckets //= 2
            found, distance = (offset > 0).long() * buckets, offset.abs()
        exact = buckets // 2
        far = exact + (distance.clamp(min=1).float() / exact).log() / log(self._max / exact) * (buckets - exact)
        return found + torch.where(distance < exact, distance, far.long().clamp(max=buckets - 1))


class Attention(nn.Module):
    """Projections without biases; scores are not scaled, since T5's weights start small."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.head_dim
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.query, self.key, self.value = (nn.Linear(config.dim, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, config.dim, bias=False)
        nn.init.normal_(self.query.weight, std=(config.dim * config.head_dim) ** -0.5)
        for layer in (self.key, self.value):
            nn.init.normal_(layer.weight, std=config.dim**-0.5)
        nn.init.normal_(self.out.weight, std=inner**-0.5)
        self.dropout = nn.Dropout(config.dropout)

    def queries(self, normed_btd: Tensor) -> Tensor:
        """``[B, T, d] → [B, H, T, e]``."""
        return self._split(self.query(normed_btd))

    def memory(self, states_bsd: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, ``[B, H, S, e]`` each."""
        return self._split(self.key(states_bsd)), self._split(self.value(states_bsd))

    def add(self, x_btd: Tensor, attended_bhte: Tensor) -> Tensor:
        """The residual stream with what was attended to."""
        added: Tensor = x_btd + self.dropout(self.out(attended_bhte.transpose(1, 2).flatten(2)))
        return added

    def _split(self, x_bti: Tensor) -> Tensor:
        split: Tensor = x_bti.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return split


class FeedForward(nn.Module):
    """``x + W_o relu(W_i norm(x))``."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.inner, self.out = nn.Linear(config.dim, config.ffn, bias=False), nn.Linear(config.ffn, config.dim, bias=False)
        nn.init.normal_(self.inner.weight, std=config.dim**-0.5)
        nn.init.normal_(self.out.weight, std=config.ffn**-0.5)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, d] → [B, T, d]``."""
        added: Tensor = x_btd + self.dropout(self.out(self.dropout(self.inner(self.norm(x_btd)).relu())))
        return added


class EncoderLayer(nn.Module):
    """Attention among all valid positions, then a feed-forward layer."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.attention, self.ffn = Attention(config), FeedForward(config)

    def probed(self, bias: RelativeBias) -> ProbedLayer:
        """The layer over jagged tokens, with what a scorer may want to know; the last token of each row is the context."""

        def run(view: TokenView) -> tuple[Tensor, LayerProbe]:
            x_bsd = to_padded(view.values, view.offsets)
            inside = held(view.lengths, x_bsd.shape[1])
            places_bs = to_padded(view.positions, view.offsets)
            own, ffn = self.attention, self.ffn
            normed = own.norm(x_bsd)
            query, (key, value) = own.queries(normed), own.memory(normed)
            attended = attend(query, key, value, bias(places_bs, places_bs) + memory_mask(inside, x_bsd))
            between = own.add(x_bsd, attended)
            out: Tensor = ffn(between)
            probe = LayerProbe(
                0,
                attention_in=normed[inside],
                attention_out=(between - x_bsd)[inside],
                ffn_in=ffn.norm(between)[inside],
                ffn_out=(out - between)[inside],
                query=last_queries(1)(query, key, value, view.lengths) * query.shape[-1] ** 0.5,  # T5 does not scale its scores
                key=key.transpose(1, 2)[inside],
                value=value.transpose(1, 2)[inside],
            )
            return out[inside], probe

        return run

    def forward(self, x_bsd: Tensor, bias_bhss: Tensor) -> Tensor:
        """``[B, S, d] → [B, S, d]``; the bias is -inf where nobody may look."""
        own = self.attention
        normed = own.norm(x_bsd)
        x_bsd = own.add(x_bsd, attend(own.queries(normed), *own.memory(normed), bias_bhss))
        out: Tensor = self.ffn(x_bsd)
        return out


class DecoderLayer(nn.Module):
    """Attention to what was generated before, to the memory, and a feed-forward layer."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.attention, self.cross, self.ffn = Attention(config), Attention(config), FeedForward(config)

    def forward(self, x_btd: Tensor, bias_bhtt: Tensor, memory: tuple[Tensor, Tensor], mask_bhts: Tensor) -> Tensor:
        """``[B, T, d] → [B, T, d]``, all positions at once."""
        own = self.attention
        normed = own.norm(x_btd)
        x_btd = own.add(x_btd, attend(own.queries(normed), *own.memory(normed), bias_bhtt))
        return self.read(x_btd, memory, mask_bhts)

    def step(
        self, x_bwd: Tensor, past: tuple[Tensor, Tensor] | None, bias_h1t: Tensor, memory: tuple[Tensor, Tensor], mask_bhts: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One more position of each of W beams; ``past`` holds its beam's keys and values, ``[B W, H, t, e]`` each."""
        own, (users, beams) = self.attention, x_bwd.shape[:2]
        normed = own.norm(x_bwd)
        alone = normed.flatten(0, 1)[:, None]
        key, value = own.memory(alone)
        if past is not None:
            key, value = torch.cat((past[0], key), 2), torch.cat((past[1], value), 2)
        attended = attend_one(own.queries(alone), key, value, bias_h1t)
        x_bwd = own.add(x_bwd.flatten(0, 1)[:, None], attended).view(users, beams, -1)
        return self.read(x_bwd, memory, mask_bhts), (key, value)

    def read(self, x_btd: Tensor, memory: tuple[Tensor, Tensor], mask_bhts: Tensor) -> Tensor:
        """Attention to the memory, and the feed-forward layer; to the memory, beams are no different from positions."""
        cross = self.cross
        x_btd = cross.add(x_btd, attend(cross.queries(cross.norm(x_btd)), *memory, mask_bhts))
        out: Tensor = self.ffn(x_btd)
        return out


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """``softmax(Q Kᵀ + bias) V``, all ``[B, H, …, e]``."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)


def attend_one(query_bh1e: Tensor, key_bhte: Tensor, value_bhte: Tensor, bias_h1t: Tensor) -> Tensor:
    """`attend` for one query and a handful of keys, by which fused attention is slower than three plain operations.

    The bias is ``[H, 1, t]``, or one for each query, ``[B, H, 1, t]``.
    """
    weights = ((query_bh1e * key_bhte).sum(-1) + bias_h1t[..., 0, :]).softmax(-1)
    return (weights[..., None] * value_bhte).sum(2, keepdim=True)


class T5(nn.Module):
    """Tokens in, states of the decoder out; one table of embeddings on both sides.

    Args:
        config: sizes.
        vocabulary: V tokens; token 0 is padding, and what the decoder starts with.
    """

    def __init__(self, config: T5Config, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocabulary, config.dim)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.encoder_bias, self.decoder_bias = RelativeBias(config, causal=False), RelativeBias(config, causal=True)
        self.encoder_norm, self.decoder_norm = nn.RMSNorm(config.dim, eps=1e-6), nn.RMSNorm(config.dim, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)

    def encode(self, tokens_bs: Tensor, valid_bs: Tensor) -> Tensor:
        """``[B, S, d]`` of tokens int64 ``[B, S]``; each row has at least one valid position."""
        places = torch.arange(tokens_bs.shape[1], device=tokens_bs.device)
        bias = self.encoder_bias(places, places) + memory_mask(valid_bs, self.embedding.weight)
        x_bsd = self.dropout(self.embedding(tokens_bs))
        for layer in self.encoder:
            x_bsd = layer(x_bsd, bias)
        out: Tensor = self.dropout(self.encoder_norm(x_bsd))
        return out

    def encode_some(self, tokens_bs: Tensor, lengths_b: Tensor, group_s: Tensor, schedule: PruneSchedule) -> tuple[Tensor, Tensor]:
        """The tokens that go through all layers of the encoder under a schedule.

        Args:
            tokens_bs: int64 ``[B, S]``, right-padded.
            lengths_b: int64 ``[B]``, how many there are in each row, at least 1.
            group_s: int64 ``[S]``, the item of each place, kept or dropped whole.
            schedule: which go on from layer to layer.

        Returns:
            ``[B, S', d]``, right-padded, and bool ``[B, S']``, which of them are there.
        """
        inside = held(lengths_b, tokens_bs.shape[1])
        groups = group_s.expand(len(tokens_bs), -1)[inside]
        view = TokenView.padded(self.dropout(self.embedding(tokens_bs)), lengths_b, groups=groups)
        layers = [layer.probed(self.encoder_bias) for layer in cast(list[EncoderLayer], list(self.encoder))]
        values, kept = schedule(layers, view)
        padded = to_padded(self.dropout(self.encoder_norm(values)), kept.offsets)
        return padded, held(kept.lengths, padded.shape[1])

    def decode(self, tokens_bt: Tensor, memory_bsd: Tensor, valid_bs: Tensor) -> Tensor:
        """``[B, T, d]``: the states from which tokens ``1 … T`` are predicted, given the tokens before them, the first of which is 0."""
        places = torch.arange(tokens_bt.shape[1], device=tokens_bt.device)
        bias = self.decoder_bias(places, places)[None].masked_fill(places[:, None] < places, -torch.inf)
        mask = memory_mask(valid_bs, self.embedding.weight)
        x_btd = self.dropout(self.embedding(tokens_bt))
        for layer in self.decoder_layers():
            x_btd = layer(x_btd, bias, layer.cross.memory(memory_bsd), mask)
        out: Tensor = self.dropout(self.decoder_norm(x_btd))
        return out

    def decoder_layers(self) -> list[DecoderLayer]:
        """The decoder's layers, in order."""
        return cast(list[DecoderLayer], list(self.decoder))

    def logits(self, states_btd: Tensor, tokens: slice) -> Tensor:
        """``[B, T, tokens]`` of some of the tokens, by the embeddings, scaled as T5 scales tied ones."""
        logits: Tensor = states_btd @ self.embedding.weight[tokens].T * float(self.config.dim) ** -0.5
        return logits

    def load_transformers(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a ``T5ForConditionalGeneration`` of the same sizes with tied embeddings and relu.

        Raises:
            RuntimeError: a weight is absent or has another shape.
        """
        self.load_state_dict({ours: state[theirs] for ours, theirs in self._transformers_names().items()})

    def _transformers_names(self) -> dict[str, str]:
        """Their name of each of our weights."""
        names = {"embedding.weight": "shared.weight"}
        for side, parts in (("encoder", ("attention", "ffn")), ("decoder", ("attention", "cross", "ffn"))):
            names[f"{side}_norm.weight"] = f"{side}.final_layer_norm.weight"
            names[f"{side}_bias.table.weight"] = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            for i in range(self.config.layers):
                for j, part in enumerate(parts):
                    ours, theirs = f"{side}.{i}.{part}", f"{side}.block.{i}.layer.{j}"
                    names[f"{ours}.norm.weight"] = f"{theirs}.layer_norm.weight"
                    inside = _INSIDE["ffn" if part == "ffn" else "attention"]
                    module = {"attention": "SelfAttention", "cross": "EncDecAttention", "ffn": "DenseReluDense"}[part]
                    names |= {f"{ours}.{our}.weight": f"{theirs}.{module}.{their}.weight" for our, their in inside.items()}
        return names


_INSIDE = {"attention": {"query": "q", "key": "k", "value": "v", "out": "o"}, "ffn": {"inner": "wi", "out": "wo"}}


class BeamDecoder:
    """Decodes the beams of B users step by step (a `PrefixScorer` but for the vocabulary, see `advance`).

    Args:
        model: in evaluation mode.
        memory_bsd: the encoded histories.
        valid_bs: their valid positions.
    """

    def __init__(self, model: T5, memory_bsd: Tensor, valid_bs: Tensor) -> None:
        self._model, self._mask = model, memory_mask(valid_bs, memory_bsd)
        self._memory = [layer.cross.memory(memory_bsd) for layer in model.decoder_layers()]
        self._past: list[tuple[Tensor, Tensor]] = []
        self._length = 0

    def advance(self, parents_bw: Tensor, tokens_bw: Tensor) -> Tensor:
        """States ``[B, W, d]`` after one more token of each beam; ``parents_bw`` is where each beam was a step before, -1 at the first."""
        model, users = self._model, len(tokens_bw)
        if self._past:
            before = self._past[0][0].shape[0] // users
            rows = (parents_bw + before * torch.arange(users, device=parents_bw.device)[:, None]).flatten()
            self._past = [(key[rows], value[rows]) for key, value in self._past]
        places = torch.arange(self._length + 1, device=tokens_bw.device)
        bias_h1t = model.decoder_bias(places[-1:], places)
        x_bwd, pasts = model.embedding(tokens_bw), []
        for i, layer in enumerate(model.decoder_layers()):
            past = self._past[i] if self._past else None
            x_bwd, kept = layer.step(x_bwd, past, bias_h1t, self._memory[i], self._mask)
            pasts.append(kept)
        self._past, self._length = pasts, self._length + 1
        out: Tensor = model.decoder_norm(x_bwd)
        return out


def memory_mask(valid_bs: Tensor, like: Tensor) -> Tensor:
    """``[B, 1, 1, S]``: 0 where valid, else -inf."""
    return like.new_zeros(valid_bs.shape).masked_fill_(~valid_bs, -torch.inf)[:, None, None]
