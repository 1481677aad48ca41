# SPDX-License-Identifier: Apache-2.0
"""The per-token SwiGLU of TokenMixer-Large and UniMixer."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kernels.token_swiglu import token_swiglu
from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.ranking.part import Penalties, TokenNorm
from recsys.ranking.per_token.base import PerToken, hidden_width, per_token_linear, xavier_uniform_per_token_, zero_bias


def reads_where_it_lies(x: Tensor) -> bool:
    """Whether norms and mixed tokens are folded into the products: not on a CPU, whose products want a token's numbers together.

    There a block of TokenMixer-Large has .75 to 1.2 of the speed that it has without (docs/results/kernels.md).
    """
    return x.device.type != "cpu"


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
        self.gate_up_bias = zero_bias(config.bias, tokens, 2 * self.hidden)
        self.down_bias = zero_bias(config.bias, tokens, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights; biases become zero."""
        xavier_uniform_per_token_(self.gate_up, self.hidden)
        xavier_uniform_per_token_(self.down, self.dim, self.config.down_init)
        for bias in (self.gate_up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_btd: Tensor, penalties: Penalties = None) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        if self.gate_up_bias is None:
            return token_swiglu(x_btd, self.gate_up, self.down)
        gate_tbh, up_tbh = per_token_linear(x_btd.transpose(0, 1), self.gate_up, self.gate_up_bias).chunk(2, dim=-1)
        return per_token_linear(functional.silu(gate_tbh) * up_tbh, self.down, self.down_bias).transpose(0, 1)

    def added(self, x_btd: Tensor, onto_btd: Tensor, penalties: Penalties = None) -> Tensor:
        """See `PerToken.added`."""
        if self.gate_up_bias is None:
            return token_swiglu(x_btd, self.gate_up, self.down, residual=onto_btd)
        return super().added(x_btd, onto_btd, penalties)

    def residual(self, x: Tensor, onto: Tensor, norm: nn.Module | None = None, penalties: Penalties = None) -> Tensor:
        """See `PerToken.residual`.

        Elsewhere than on a CPU an RMSNorm's gain goes into the weights and its scale behind the first product, so that nothing is normed in
        memory, and parts are read and written where they lie.
        """
        if not reads_where_it_lies(x) or self.gate_up_bias is not None or not (norm is None or isinstance(norm, TokenNorm)):
            return super().residual(x, onto, norm, penalties)
        if norm is None:
            return token_swiglu(x, self.gate_up, self.down, residual=onto)
        return token_swiglu(x, norm.weight[:, None] * self.gate_up, self.down, norm.scale(x), onto)

    @property
    def flops(self) -> int:
        """``6 n T D²``: gate, up and down."""
        return 6 * self.tokens * self.dim * self.hidden
