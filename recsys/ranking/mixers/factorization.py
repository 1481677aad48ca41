# SPDX-License-Identifier: Apache-2.0
"""The interaction layer of Wukong."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.ranking.mixers.base import Mixer
from recsys.ranking.mlp import mlp
from recsys.ranking.part import linear_flops


def combine_tokens(weight_nt: Tensor, x_btd: Tensor) -> Tensor:
    """n linear combinations of the tokens of each row: ``[B, T, D] → [B, n, D]``, tokens-outermost in memory."""
    x_tbd = x_btd.transpose(0, 1)
    combined_nbd: Tensor = (weight_nt @ x_tbd.flatten(1)).unflatten(1, x_tbd.shape[1:])
    return combined_nbd.transpose(0, 1)


@register("mixer", "factorization_machine")
class FactorizationMachine(Mixer):
    """What a layer of Wukong does before its residual and its norm (Meta, arXiv 2403.02545).

    The T tokens of the result are ``n_F`` from the factorization-machine block and, after them, ``n_L`` from the linear compression::

        FMB = reshape(MLP(LayerNorm(flatten(X (Xᵀ Y)))))    Y [T, k]
        LCB = W_L X                                         W_L [n_L, T]

    Without projection ``X Xᵀ`` would be T × T; ``Xᵀ Y`` first costs ``T D k`` instead of ``T² D``. The paper lets a layer change the
    number of tokens, with a linear map in its residual; here ``n_F + n_L = T`` in every layer, so that the residual is the identity.

    Chosen where the paper is silent: no bias in the linear compression, ReLU in the MLP, Xavier-uniform Y and W_L.

    Raises:
        ConfigError: ``fm_tokens`` leaves no token to one of the blocks.
    """

    class Config(BaseConfig):
        """Sizes.

        Attributes:
            rank: k, the columns of Y.
            fm_tokens: n_F; half of the tokens, rounded down, by default.
            hidden: widths of the MLP's hidden layers.
        """

        name: Literal["factorization_machine"] = "factorization_machine"
        rank: int = Field(8, ge=1)
        fm_tokens: int | None = None
        hidden: tuple[int, ...] = (32, 32)

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)
        self.rank, self.fm_tokens = config.rank, tokens // 2 if config.fm_tokens is None else config.fm_tokens
        if not 1 <= self.fm_tokens < tokens:
            raise ConfigError(
                f"factorization_machine: expected fm_tokens from 1 to tokens - 1 ({tokens - 1}), so that both of its blocks give tokens, "
                f"got {self.fm_tokens}"
            )
        self.projection = nn.Parameter(nn.init.xavier_uniform_(torch.empty(tokens, config.rank)))
        self.compression = nn.Parameter(nn.init.xavier_uniform_(torch.empty(tokens - self.fm_tokens, tokens)))
        self.norm = nn.LayerNorm(tokens * config.rank)
        self.mlp = mlp((tokens * config.rank, *config.hidden, self.fm_tokens * dim), activation=nn.ReLU)

    def interactions(self, x_btd: Tensor) -> Tensor:
        """``X (Xᵀ Y)``, ``[B, T, k]``: inner products of every token with k combinations of the tokens."""
        return torch.bmm(x_btd, combine_tokens(self.projection.T, x_btd).transpose(1, 2))

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        fm_bfd = self.mlp(self.norm(self.interactions(x_btd).flatten(1))).unflatten(1, (self.fm_tokens, self.dim))
        compressed_bld = combine_tokens(self.compression, x_btd)
        return torch.cat([fm_bfd.transpose(0, 1), compressed_bld.transpose(0, 1)]).transpose(0, 1)

    @property
    def flops(self) -> int:
        """``4 T D k + 2 n_L T D``, and those of the MLP."""
        return 2 * self.tokens * self.dim * (2 * self.rank + self.tokens - self.fm_tokens) + linear_flops(self.mlp)
