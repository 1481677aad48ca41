# SPDX-License-Identifier: Apache-2.0
"""The per-token feed-forward network of RankMixer."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.ranking.part import Penalties
from recsys.ranking.per_token.base import PerToken, hidden_width, per_token_linear, xavier_uniform_per_token_, zero_bias


@register("per_token", "ffn")
class FFN(PerToken):
    """pFFN of RankMixer (arXiv 2507.15551): ``y_t = gelu(x_t U_t + b_t) W_t + c_t``.

    Chosen where the paper is silent: exact GELU, Xavier-uniform weights with fans per token, zero biases, expansion 4.
    """

    class Config(BaseConfig):
        """Sizes and initialisation; see `SwiGLU.Config`."""

        name: Literal["ffn"] = "ffn"
        expansion: float = Field(4.0, gt=0)
        bias: bool = True
        down_init: float = Field(1.0, ge=0)

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)
        self.config = config
        self.hidden = hidden_width(config.expansion, dim)
        self.up = nn.Parameter(torch.empty(tokens, dim, self.hidden))
        self.down = nn.Parameter(torch.empty(tokens, self.hidden, dim))
        self.up_bias = zero_bias(config.bias, tokens, self.hidden)
        self.down_bias = zero_bias(config.bias, tokens, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights; biases become zero."""
        xavier_uniform_per_token_(self.up, self.hidden)
        xavier_uniform_per_token_(self.down, self.dim, self.config.down_init)
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_btd: Tensor, penalties: Penalties = None) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        hidden_tbh = functional.gelu(per_token_linear(x_btd.transpose(0, 1), self.up, self.up_bias))
        return per_token_linear(hidden_tbh, self.down, self.down_bias).transpose(0, 1)

    @property
    def flops(self) -> int:
        """``4 n T D²``: up and down."""
        return 4 * self.tokens * self.dim * self.hidden
