# SPDX-License-Identifier: Apache-2.0
"""The rule-based token mixing of RankMixer and TokenMixer-Large."""

from typing import Literal

from torch import Tensor

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.ranking.mixers.base import ReversibleMixer


def mix(x_btd: Tensor, heads: int) -> Tensor:
    """Token mixing without parameters (RankMixer, arXiv 2507.15551; TokenMixer-Large, arXiv 2602.06563).

    Row h of the result holds slice h of every token, one after another. It is a permutation of coordinates, hence an isometry whose
    gradient is `revert`.

    Args:
        x_btd: ``[B, T, D]``.
        heads: H, a divisor of D.

    Returns:
        ``[B, H, T * D / H]``, with H outermost in memory.
    """
    x_tbhd: Tensor = x_btd.transpose(0, 1).unflatten(2, (heads, -1))
    mixed_hbd: Tensor = x_tbhd.permute(2, 1, 0, 3).flatten(2)
    return mixed_hbd.transpose(0, 1)


def revert(x_bhd: Tensor, tokens: int) -> Tensor:
    """The inverse of `mix`: ``[B, H, T * d] → [B, T, H * d]``.

    It is `mix` with the roles of tokens and heads exchanged.

    Args:
        x_bhd: mixed tokens.
        tokens: T.
    """
    return mix(x_bhd, tokens)


@register("mixer", "token_mix")
class TokenMix(ReversibleMixer):
    """The rule-based token mixing of RankMixer and TokenMixer-Large: see `mix`.

    Raises:
        ConfigError: ``heads`` does not divide ``dim``.
    """

    class Config(BaseConfig):
        """``heads``: H; by default as many as there are tokens, which keeps the shape."""

        name: Literal["token_mix"] = "token_mix"
        heads: int | None = None

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)
        heads = tokens if config.heads is None else config.heads
        if heads < 1 or dim % heads:
            raise ConfigError(f"token_mix: expected heads that divide dim, got dim={dim} and heads={heads}")
        self.mixed_tokens, self.mixed_dim = heads, tokens * dim // heads

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, H, T * D / H]``."""
        return mix(x_btd, self.mixed_tokens)

    def parts(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, H, T, D / H]``: row h has its slice of every token."""
        parts_bthw: Tensor = x_btd.unflatten(2, (self.mixed_tokens, -1))
        return parts_bthw.transpose(1, 2)

    def join(self, x_bhpw: Tensor) -> Tensor:
        """``[B, H, T, D / H] → [B, T, D]``, tokens-outermost in memory."""
        joined_tbd: Tensor = x_bhpw.permute(2, 0, 1, 3).flatten(2)
        return joined_tbd.transpose(0, 1)

    def revert(self, x_bhd: Tensor) -> Tensor:
        """``[B, H, T * D / H] → [B, T, D]``."""
        return revert(x_bhd, self.tokens)
