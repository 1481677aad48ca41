# SPDX-License-Identifier: Apache-2.0
"""Per-token transformations: every token has weights of its own.

All products are one ``torch.bmm`` over the token axis. The operand is read tokens-outermost (``x.transpose(0, 1)``), which is free for
an input that lies so in memory, and the result is returned as ``[B, T, D]`` by shape, tokens-outermost in memory.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig


class PerToken(nn.Module, ABC):
    """``[B, T, D] → [B, T, D]``, where token t of the output depends on token t and its own weights alone.

    Built as ``cls(config, tokens, dim)``.

    Args:
        tokens: T.
        dim: D.
    """

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.tokens, self.dim = tokens, dim

    @abstractmethod
    def forward(self, x_btd: Tensor) -> Tensor:
        """Transform each token."""


def hidden_width(expansion: float, dim: int) -> int:
    """The hidden width for a token of width ``dim``: ``expansion * dim``, rounded, and at least 1."""
    return max(1, round(expansion * dim))


def xavier_uniform_per_token_(weight_tio: Tensor, fan_out: int, scale: float = 1.0) -> None:
    """Fill ``[T, D_in, ·]`` with ``scale`` × Xavier-uniform values, the fans being those of one token's matrix ``D_in × fan_out``.

    ``torch.nn.init.xavier_uniform_`` would take a tensor of three axes for a convolution and count T among its fans.
    """
    bound = scale * math.sqrt(6.0 / (weight_tio.shape[1] + fan_out))
    nn.init.uniform_(weight_tio, -bound, bound)


def _bias(present: bool, tokens: int, width: int) -> nn.Parameter | None:
    """Zeros ``[T, 1, width]``, as `per_token_linear` adds them; or None."""
    return nn.Parameter(torch.zeros(tokens, 1, width)) if present else None


def per_token_linear(x_tbi: Tensor, weight_tio: Tensor, bias_t1o: Tensor | None) -> Tensor:
    """``y[t] = x[t] @ W[t] + b[t]``: ``[T, B, D_in] → [T, B, D_out]``."""
    return torch.bmm(x_tbi, weight_tio) if bias_t1o is None else torch.baddbmm(bias_t1o, x_tbi, weight_tio)


@register("per_token", "swiglu")
class SwiGLU(PerToken):
    """pSwiGLU of TokenMixer-Large (arXiv 2602.06563, eqs. 17-18): ``y_t = (silu(x_t G_t) ⊙ x_t U_t) W_t``.

    The gate and up matrices stand side by side in ``gate_up [T, D, 2 * hidden]``, the down matrix is ``down [T, hidden, D]``.

    Chosen where the paper is silent or disagrees with itself: no biases (its main text writes them, its appendix removes them);
    Xavier-uniform (the text) rather than Xavier-normal (the appendix), with fans per token and per matrix.
    """

    class Config(BaseConfig):
        """Sizes and initialisation.

        Attributes:
            expansion: hidden width ÷ D.
            bias: whether the three products have biases.
            down_init: factor on the initial down matrix; small, so that a new block is nearly the identity.
        """

        name: Literal["swiglu"] = "swiglu"
        expansion: float = Field(2.0, gt=0)
        bias: bool = False
        down_init: float = Field(0.01, ge=0)

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)
        self.config = config
        self.hidden = hidden_width(config.expansion, dim)
        self.gate_up = nn.Parameter(torch.empty(tokens, dim, 2 * self.hidden))
        self.down = nn.Parameter(torch.empty(tokens, self.hidden, dim))
        self.gate_up_bias = _bias(config.bias, tokens, 2 * self.hidden)
        self.down_bias = _bias(config.bias, tokens, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights; biases become zero."""
        xavier_uniform_per_token_(self.gate_up, self.hidden)
        xavier_uniform_per_token_(self.down, self.dim, self.config.down_init)
        for bias in (self.gate_up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        gate_tbh, up_tbh = per_token_linear(x_btd.transpose(0, 1), self.gate_up, self.gate_up_bias).chunk(2, dim=-1)
        return per_token_linear(functional.silu(gate_tbh) * up_tbh, self.down, self.down_bias).transpose(0, 1)


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
        self.up_bias = _bias(config.bias, tokens, self.hidden)
        self.down_bias = _bias(config.bias, tokens, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights; biases become zero."""
        xavier_uniform_per_token_(self.up, self.hidden)
        xavier_uniform_per_token_(self.down, self.dim, self.config.down_init)
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        hidden_tbh = functional.gelu(per_token_linear(x_btd.transpose(0, 1), self.up, self.up_bias))
        return per_token_linear(hidden_tbh, self.down, self.down_bias).transpose(0, 1)
