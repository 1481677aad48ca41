# SPDX-License-Identifier: Apache-2.0
"""The ensemble of interactions of DHEN, and three of its members."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core import components
from recsys.core.components import component_config, register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.ranking.interactions import DotInteraction
from recsys.ranking.mixers.attention import SelfAttention
from recsys.ranking.mixers.base import Mixer
from recsys.ranking.mixers.factorization import combine_tokens
from recsys.ranking.part import linear_flops


@register("mixer", "dot")
class Dot(Mixer):
    """The inner products of all pairs of tokens (see `DotInteraction`), and an affine map of them to T tokens.

    Raises:
        ConfigError: there is only one token, hence no pair.
    """

    class Config(BaseConfig):
        """Nothing to choose."""

        name: Literal["dot"] = "dot"

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)
        if tokens < 2:
            raise ConfigError(f"dot: expected at least 2 tokens, got {tokens}")
        self.products = DotInteraction(tokens, dim)
        self.out = nn.Linear(self.products.width, tokens * dim)

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        out_btd: Tensor = self.out(self.products(x_btd)).unflatten(1, (self.tokens, self.dim))
        return out_btd

    @property
    def flops(self) -> int:
        """``2 T² D``, since the whole of ``X Xᵀ`` is computed, and ``T² (T − 1) D``."""
        return self.products.flops + linear_flops(self.out)


@register("mixer", "cross")
class Cross(Mixer):
    """``x ⊙ (W x + b)`` of the tokens' concatenation x: DCN-V2's cross layer without its residual, which is the block's (arXiv 2008.13535).

    It is the first cross layer, where ``x_0 = x``: later blocks cross their own input and not the model's.
    """

    class Config(BaseConfig):
        """``rank``: that of ``W = V U``; null for a full matrix, which has ``T² D²`` weights."""

        name: Literal["cross"] = "cross"
        rank: int | None = Field(None, ge=1)

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)
        width = tokens * dim
        self.weight: nn.Module = nn.Linear(width, width)
        if config.rank is not None:
            self.weight = nn.Sequential(nn.Linear(width, config.rank, bias=False), nn.Linear(config.rank, width))

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        x_bl = x_btd.flatten(1)
        out_btd: Tensor = (x_bl * self.weight(x_bl)).unflatten(1, (self.tokens, self.dim))
        return out_btd

    @property
    def flops(self) -> int:
        """``2 T² D²``, or ``4 r T D``."""
        return linear_flops(self)


class TokenCombination(Mixer):
    """``W X``: each token of the result is a linear combination of the tokens. W is Xavier-uniform.

    Args:
        outputs: how many tokens it gives.
        tokens: T.
        dim: D.
    """

    def __init__(self, outputs: int, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)
        self.mixed_tokens = outputs
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(outputs, tokens)))

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, outputs, D]``."""
        return combine_tokens(self.weight, x_btd)

    @property
    def flops(self) -> int:
        """``2 outputs T D``."""
        return 2 * self.weight.numel() * self.dim


@register("mixer", "linear")
class Linear(TokenCombination):
    """``W X`` with W ``[T, T]``: see `TokenCombination`. It is the same for all channels and all rows of the batch."""

    class Config(BaseConfig):
        """Nothing to choose."""

        name: Literal["linear"] = "linear"

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(tokens, tokens, dim)


@register("mixer", "ensemble")
class Ensemble(Mixer):
    """Several interactions of the same tokens side by side, and their sum or concatenation (DHEN, arXiv 2203.11014).

    Any mixer that keeps the shape can be a member. With ``concat`` the T tokens of the result are shared out among the members as evenly
    as possible, the first ones getting one more; each member's T tokens go through a linear map over tokens to its share. So a block's
    residual stays the identity, where the paper lets the number of tokens vary and projects its shortcut.

    Raises:
        ConfigError: there is no member, one changes the shape, or with ``concat`` there are more members than tokens.
    """

    class Config(BaseConfig):
        """What is combined, and how.

        Attributes:
            interactions: the members, each the configuration of a mixer.
            combine: how their results make one.
        """

        name: Literal["ensemble"] = "ensemble"
        interactions: tuple[component_config("mixer"), ...] = (  # type: ignore[valid-type]
            Dot.Config(),
            SelfAttention.Config(),
            Cross.Config(),
            Linear.Config(),
        )
        combine: Literal["sum", "concat"] = "sum"

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)
        members: list[Mixer] = [components.build("mixer", member, tokens, dim) for member in config.interactions]
        if not members:
            raise ConfigError("ensemble: interactions: expected at least one mixer, got none")
        for member in members:
            if (member.mixed_tokens, member.mixed_dim) != (tokens, dim):
                shapes = f"{(tokens, dim)}, got {(member.mixed_tokens, member.mixed_dim)} from {type(member).__name__}"
                raise ConfigError(f"ensemble: interactions: expected (tokens, dim) to stay {shapes}")
        self.interactions = nn.ModuleList(members)
        self.shares = nn.ModuleList()
        if config.combine == "concat":
            if len(members) > tokens:
                raise ConfigError(f"ensemble: concat: expected at most as many interactions as tokens ({tokens}), got {len(members)}")
            each, more = divmod(tokens, len(members))
            self.shares.extend(TokenCombination(each + (i < more), tokens, dim) for i in range(len(members)))

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        results = [interaction(x_btd) for interaction in self.interactions]
        if not self.shares:
            return torch.stack(results).sum(dim=0)
        shared = [share(result) for share, result in zip(self.shares, results, strict=True)]
        return torch.cat([share_bnd.transpose(0, 1) for share_bnd in shared]).transpose(0, 1)

    @property
    def flops(self) -> int:
        """Those of the members and of the shares: ``2 T² D`` in all."""
        return sum(part.flops for part in (*self.interactions, *self.shares) if isinstance(part, Mixer))
