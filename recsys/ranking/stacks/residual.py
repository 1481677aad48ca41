# SPDX-License-Identifier: Apache-2.0
"""The two classic block styles: a norm after each residual sum, or before each sublayer."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.ranking.mixers import Mixer
from recsys.ranking.part import Penalties, TokenLayerNorm, TokenNorm
from recsys.ranking.stacks.base import Block, Parts, Sequence

Norm = Literal["layer", "rms"]


def new_norm(kind: Norm, dim: int) -> nn.Module:
    """A norm over the width of each token."""
    return TokenLayerNorm(dim) if kind == "layer" else TokenNorm(dim)


def same_shape(parts: Parts) -> Mixer:
    """A mixer whose output can be added to its input.

    Raises:
        ConfigError: it changes the shape.
    """
    mixer = parts.new_mixer()
    if (mixer.mixed_tokens, mixer.mixed_dim) != (parts.tokens, parts.dim):
        raise ConfigError(
            f"stack: a residual around the mixer needs its input's shape (tokens, dim) = {(parts.tokens, parts.dim)}, "
            f"got {(mixer.mixed_tokens, mixer.mixed_dim)}; with token_mix, heads must equal tokens ({parts.tokens})"
        )
    return mixer


class _ResidualBlock(Block):
    """A mixer and, where there is one, a per-token transformation F, each with a norm.

    Args:
        parts: T, D, mixer and F.
        norm: the kind of norm.
    """

    def __init__(self, parts: Parts, norm: Norm) -> None:
        super().__init__()
        self.mixer, self.norm1 = same_shape(parts), new_norm(norm, parts.dim)
        self.per_token = parts.new_per_token() if parts.per_token is not None else None
        self.norm2 = new_norm(norm, parts.dim) if parts.per_token is not None else None


class PostNormBlock(_ResidualBlock):
    """``S = norm(mix(X) + X)``, ``Y = norm(F(S) + S)``: the block of RankMixer (arXiv 2507.15551). Without F it ends at S."""

    def forward(self, x_btd: Tensor, penalties: Penalties = None) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        out_btd: Tensor = self.norm1(self.mixer(x_btd) + x_btd)
        if self.per_token is not None and self.norm2 is not None:
            out_btd = self.norm2(self.per_token.added(out_btd, out_btd, penalties))
        return out_btd


class PreNormBlock(_ResidualBlock):
    """``S = X + mix(norm(X))``, ``Y = S + F(norm(S))``: the pre-norm transformer block. Without F it ends at S."""

    def forward(self, x_btd: Tensor, penalties: Penalties = None) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        out_btd: Tensor = x_btd + self.mixer(self.norm1(x_btd))
        if self.per_token is not None and self.norm2 is not None:
            out_btd = self.per_token.residual(out_btd, out_btd, self.norm2, penalties)
        return out_btd


@register("stack", "post_norm")
class PostNorm(Sequence):
    """Blocks with a norm after each residual sum: see `PostNormBlock`."""

    class Config(BaseConfig):
        """The kind of norm, and the gap of an inter-layer residual in blocks (null for none; RankMixer has none)."""

        name: Literal["post_norm"] = "post_norm"
        norm: Norm = "layer"
        inter_residual: int | None = Field(None, ge=1)

    normalised: ClassVar[bool] = True

    def __init__(self, config: Config, parts: Parts, blocks: int) -> None:
        super().__init__((PostNormBlock(parts, config.norm) for _ in range(blocks)), config.inter_residual)


@register("stack", "pre_norm")
class PreNorm(Sequence):
    """Blocks with a norm before each sublayer: see `PreNormBlock`."""

    class Config(BaseConfig):
        """The kind of norm, and the gap of an inter-layer residual in blocks (null for none)."""

        name: Literal["pre_norm"] = "pre_norm"
        norm: Norm = "rms"
        inter_residual: int | None = Field(None, ge=1)

    normalised: ClassVar[bool] = False

    def __init__(self, config: Config, parts: Parts, blocks: int) -> None:
        super().__init__((PreNormBlock(parts, config.norm) for _ in range(blocks)), config.inter_residual)
