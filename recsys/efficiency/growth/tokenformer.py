# SPDX-License-Identifier: Apache-2.0
"""TokenFormer: linear layers as attention to learned pairs of key and value, of which more can be added to a trained model."""

from collections.abc import Mapping
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError

Activation = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]


class Pattention(nn.Module):
    """Attention of a token to n learned pairs, in the place of `nn.Linear` and without a bias.

    ``scores = x Kᵀ``; then ``gelu(tau scores / ‖scores‖₂)`` (the default), ``tau gelu(scores) / ‖gelu(scores)‖₂``, or
    ``tau softmax(scores)``; then times the values. The first is blind to the scale of x: magnitudes must be given as features.

    tau is √n (n with softmax) of the first construction and never changes, also in checkpoints; the release takes the current n, and so
    changes what a model says when it grows. New keys are zero, so that their scores and activations are; new values are random, since
    with both at zero no gradient would ever come. Scores whose norm is below ``eps``, as of a padded row, give
    zeros and no gradient, which would be one of 1 / ``eps``.

    Args:
        in_features: of x.
        out_features: of the result.
        pairs: n.
        activation: of the scores.
        key_std: of the normal distribution from which keys are drawn.
        value_std: likewise for values, now and when growing.
        eps: the least norm.

    Raises:
        ConfigError: ``pairs`` is below 1, or the activation unknown.
    """

    tau: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pairs: int,
        activation: Activation = "l2_norm_gelu",
        key_std: float = 0.02,
        value_std: float = 0.02,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if pairs < 1:
            raise ConfigError(f"pairs: expected at least 1, got {pairs!r}")
        if activation not in ("l2_norm_gelu", "gelu_l2_norm", "softmax"):
            raise ConfigError(f"activation: expected l2_norm_gelu, gelu_l2_norm or softmax, got {activation!r}")
        self.in_features, self.out_features = in_features, out_features
        self.activation, self.value_std, self.eps = activation, value_std, eps
        self.key = nn.Parameter(torch.randn(pairs, in_features) * key_std)
        self.value = nn.Parameter(torch.randn(pairs, out_features) * value_std)
        self.register_buffer("tau", torch.tensor(float(pairs) if activation == "softmax" else float(pairs) ** 0.5))

    @property
    def pairs(self) -> int:
        """How many there are now."""
        return len(self.key)

    def forward(self, x: Tensor) -> Tensor:
        """``[…, in_features]`` to ``[…, out_features]``."""
        scores, tau = F.linear(x, self.key), self.tau.to(x.dtype)
        if self.activation == "softmax":
            weights = scores.softmax(-1) * tau
        elif self.activation == "l2_norm_gelu":
            weights = F.gelu(unit_scores(scores, self.eps) * tau)
        else:
            weights = unit_scores(F.gelu(scores), self.eps) * tau
        return weights @ self.value

    @torch.no_grad()
    def grow(self, pairs: int) -> None:
        """Append pairs in place; results stay what they are. Optimisers follow by `grow_optimizer_state`.

        Raises:
            ConfigError: the activation is softmax, under which every new pair takes weight from the old ones, or ``pairs`` is negative.
        """
        if self.activation == "softmax":
            raise ConfigError("grow: expected activation l2_norm_gelu or gelu_l2_norm, got softmax, whose results would change")
        if pairs < 0:
            raise ConfigError(f"grow: pairs: expected at least 0, got {pairs!r}")
        values = torch.randn(pairs, self.out_features, dtype=self.value.dtype, device=self.value.device) * self.value_std
        replace_parameter(self.key, torch.cat((self.key, self.key.new_zeros(pairs, self.in_features))))
        replace_parameter(self.value, torch.cat((self.value, values)))

    @torch.no_grad()
    def shrink(self, pairs: int) -> None:
        """Remove the last ``pairs`` in place: the inverse of `grow`, and without effect on results while their keys are zero.

        Raises:
            ConfigError: no pair would be left, or ``pairs`` is negative.
        """
        if not 0 <= pairs < self.pairs:
            raise ConfigError(f"shrink: pairs: expected 0 to {self.pairs - 1}, got {pairs!r}")
        left = self.pairs - pairs
        for parameter in (self.key, self.value):
            replace_parameter(parameter, parameter[:left].clone())

    def extra_repr(self) -> str:
        """For the module's representation."""
        return f"{self.in_features}, {self.out_features}, pairs={self.pairs}, activation={self.activation}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        """A checkpoint of another size sets the size."""
        key, value = (state_dict.get(prefix + name) for name in ("key", "value"))
        if isinstance(key, Tensor) and isinstance(value, Tensor) and len(key) == len(value) != self.pairs:
            for parameter in (self.key, self.value):
                replace_parameter(parameter, parameter.detach().new_zeros(len(key), parameter.shape[1]))
        super()._load_from_state_dict(state_dict, prefix, *others)  # type: ignore[arg-type]


def unit_scores(scores: Tensor, eps: float) -> Tensor:
    """Scores ``[…, n]`` over their norm; zeros, without a gradient, where that is below ``eps``."""
    norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True)
    unit: Tensor = (scores / norm.clamp(min=eps)).masked_fill(norm < eps, 0.0)
    return unit


def replace_parameter(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter other values, of any size. It stays the same object, so whoever holds it keeps it."""
    parameter.data, parameter.grad = values, None


def grow_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Fit the state of Adam and its kin to parameters that grew or shrank: zeros for new rows, and old rows keep theirs."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape[1:] == parameter.shape[1:]:
                state[name] = _resized(value, len(parameter))


def _resized(value: Tensor, rows: int) -> Tensor:
    missing = max(rows - len(value), 0)
    return torch.cat((value[:rows], value.new_zeros(missing, *value.shape[1:])))


class TokenFormerBlock(nn.Module):
    """Pre-norm causal attention and one `Pattention` in the place of the feed-forward network; norms have no parameters."""

    def __init__(self, config: "TokenFormer.Config") -> None:
        super().__init__()
        std = 2.0 / (config.layers * config.dim**0.5)
        self.heads, self.rotary, self.shape = config.heads, config.rotary_width, (config.dim,)

        def pattention(pairs: int) -> Pattention:
            return Pattention(config.dim, config.dim, pairs, config.activation, value_std=std, eps=config.eps)

        self.query, self.key, self.value, self.out = (pattention(config.pairs) for _ in range(4))
        self.ffn = pattention(config.ffn_pairs)

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, d]`` to ``[B, T, d]``."""
        normed = F.layer_norm(x_btd, self.shape)
        query, key, value = (part(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        query, key = (rotated(x, self.rotary) for x in (query, key))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_btd = x_btd + self.out(attended.transpose(1, 2).flatten(2))
        updated: Tensor = x_btd + self.ffn(F.layer_norm(x_btd, self.shape))
        return updated

    def grow(self, pairs: int, ffn_pairs: int) -> None:
        """See `TokenFormer.grow`."""
        for part in (self.query, self.key, self.value, self.out):
            part.grow(pairs)
        self.ffn.grow(ffn_pairs)


class TokenFormer(nn.Module):
    """A causal transformer whose every weight is a pair of a `Pattention`, ``2 d (4 pairs + ffn_pairs)`` for each layer.

    Width, heads and depth stay when it grows. Initial values follow the release: keys N(0, 0.02²), values N(0, (2 / (layers √d))²).
    Embeddings and the output head belong to the caller.
    """

    class Config(BaseConfig):
        """Size.

        Attributes:
            dim: d.
            layers: how many.
            heads: attention heads; d / heads is at least 2.
            pairs: of each of query, key, value and output; d in the release.
            ffn_pairs: of the feed-forward part; 4 d in the release.
            rotary_share: of each head's width that is rotated by position, rounded down to an even number, at least 2.
            activation: see `Pattention`; a model with softmax cannot grow.
            eps: the least norm of scores.
        """

        name: Literal["tokenformer"] = "tokenformer"
        dim: int = Field(64, ge=2)
        layers: int = Field(2, ge=1)
        heads: int = Field(2, ge=1)
        pairs: int = Field(64, ge=1)
        ffn_pairs: int = Field(256, ge=1)
        rotary_share: float = Field(0.25, gt=0.0, le=1.0)
        activation: Activation = "l2_norm_gelu"
        eps: float = Field(1e-6, gt=0.0)

        @model_validator(mode="after")
        def _heads_have_width(self) -> Self:
            if self.dim % self.heads or self.dim // self.heads < 2:
                raise ValueError(f"dim: expected a multiple of heads={self.heads}, at least twice it, got {self.dim}")
            return self

        @property
        def rotary_width(self) -> int:
            """Coordinates of each head that are rotated."""
            return max(2, 2 * int(self.rotary_share * (self.dim // self.heads) / 2))

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TokenFormerBlock(config) for _ in range(config.layers))
        self.shape = (config.dim,)

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, d]`` to ``[B, T, d]``, after a final norm. Right padding needs no mask: it comes after everything that matters."""
        for block in self.blocks:
            x_btd = block(x_btd)
        return F.layer_norm(x_btd, self.shape)

    def grow(self, pairs: int, ffn_pairs: int) -> None:
        """Append pairs to every layer in place; what the model says stays. Optimisers follow by `grow_optimizer_state`.

        Args:
            pairs: to each of query, key, value and output.
            ffn_pairs: to the feed-forward part.

        Raises:
            ConfigError: see `Pattention.grow`; then nothing has changed.
        """
        if pairs < 0 or ffn_pairs < 0:
            raise ConfigError(f"grow: pairs, ffn_pairs: expected at least 0, got {pairs!r} and {ffn_pairs!r}")
        for block in cast(list[TokenFormerBlock], list(self.blocks)):
            block.grow(pairs, ffn_pairs)


def rotated(x_bhte: Tensor, width: int) -> Tensor:
    """Rotary positions 0 … T - 1 on the first ``width`` coordinates, an even number, of ``[B, H, T, e]`` (base 10000, halves paired)."""
    place = torch.arange(x_bhte.shape[2], dtype=torch.float64, device=x_bhte.device)
    rates = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64, device=x_bhte.device) / width)
    angle = place[:, None] * rates
    cos, sin = angle.cos().to(x_bhte.dtype), angle.sin().to(x_bhte.dtype)
    first, second = x_bhte[..., :width].chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, x_bhte[..., width:]), -1)
