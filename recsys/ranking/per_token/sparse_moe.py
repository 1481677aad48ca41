# SPDX-License-Identifier: Apache-2.0
"""The sparse per-token mixture of experts of TokenMixer-Large."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kernels.routed_experts import routed_experts
from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.ranking.part import Penalties
from recsys.ranking.per_token.base import hidden_width, per_token_linear
from recsys.ranking.per_token.quantized import Mixture, QuantizedExperts
from recsys.ranking.per_token.routing import choose, router_logits
from recsys.ranking.per_token.swiglu import SwiGLU


@register("per_token", "sparse_moe")
class SparseMoE(Mixture):
    """SP-MoE of TokenMixer-Large (arXiv 2602.06563, eqs. 20-21): every token has a router and E experts of its own.

    ::

        y_t = Shared_t(x_t) + α Σ_{i in Top-(k-1)} g_ti · Expert_ti(x_t)

    An expert is a SwiGLU of hidden width ``n D / E``: a slice of the dense transformation of width ``n D``. Expert 0 is shared and
    always on; a router chooses k - 1 of the other E - 1. All E together have the parameters of the dense one, plus the router's, and
    k / E of them work on one row. `recsys.ranking.per_token.conversion` makes one from a trained `SwiGLU` ("first enlarge, then sparse").

    Chosen where the paper is silent:

    - with one routed expert (k = 2) a softmax over the chosen ones is 1 whatever the router says, and the router would never learn.
      That pair of settings is an error; ``gate_norm: all`` is the way out, whose gates do not sum to 1;
    - α = E / k, the paper's 2 at 1:2 and 4 at 1:4;
    - a fresh module starts as the slices of a fresh `SwiGLU`, its down matrices of 0.01 × Xavier included; routers are small normal,
      since with a router of zeros every row would choose the same experts;
    - logits, softmax and choice are computed in float32 or better; equal logits go to the lower index; no noise, no capacity limit;
    - no biases, as in `SwiGLU` by default. The paper describes no balance loss; one is offered, by default off.

    Raises:
        ConfigError: the sizes do not fit together, or the router could not learn.
    """

    class Config(BaseConfig):
        """Sizes, routing and initialisation.

        Attributes:
            expansion: n, the hidden width of all experts of a token together ÷ D.
            experts: E, the shared one included. At least 3: with one routed expert there is nothing to choose.
            active: k, how many work on each row, the shared one included. At least 2.
            gate_scale: α, on the routed sum alone; null for E / k.
            gate_norm: the softmax runs over the ``selected`` experts, so that the gates sum to 1 (the paper), or over ``all`` routed ones.
            balance: the weight of a Switch-type balance loss, ``Σ_t (E-1) Σ_e f_te P_te``, where f is the share of the choices that fell
                on expert e and P its mean probability (T where both are uniform).
            down_init: factor on the initial down matrices.
            router_init: the standard deviation of the initial routers.
        """

        name: Literal["sparse_moe"] = "sparse_moe"
        expansion: float = Field(2.0, gt=0)
        experts: int = Field(8, ge=3)
        active: int = Field(4, ge=2)
        gate_scale: float | None = Field(None, gt=0)
        gate_norm: Literal["selected", "all"] = "selected"
        balance: float = Field(0.0, ge=0)
        down_init: float = Field(0.01, ge=0)
        router_init: float = Field(0.02, ge=0)

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)
        hidden = hidden_width(config.expansion, dim)
        _check(config, hidden)
        self.config, self.hidden = config, hidden // config.experts
        self.gate_scale = config.experts / config.active if config.gate_scale is None else config.gate_scale
        routed = config.experts - 1
        self.router = nn.Parameter(torch.empty(tokens, dim, routed))
        self.shared_gate_up = nn.Parameter(torch.empty(tokens, dim, 2 * self.hidden))
        self.shared_down = nn.Parameter(torch.empty(tokens, self.hidden, dim))
        self.gate_up = nn.Parameter(torch.empty(tokens, routed, dim, 2 * self.hidden))
        self.down = nn.Parameter(torch.empty(tokens, routed, self.hidden, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.normal_(self.router, std=self.config.router_init)
        with self.router.device:
            self.load_dense(SwiGLU(SwiGLU.Config(expansion=self.config.expansion, down_init=self.config.down_init), self.tokens, self.dim))

    @torch.no_grad()
    def load_dense(self, dense: SwiGLU) -> None:
        """Take the hidden axis of a dense transformation, cut into E slices, as the experts; the first slice is the shared one.

        Raises:
            ConfigError: it has other sizes, or biases.
        """
        given, expected = (dense.tokens, dense.dim, dense.hidden), (self.tokens, self.dim, self.config.experts * self.hidden)
        if given != expected:
            raise ConfigError(f"sparse_moe: expected a dense SwiGLU of (tokens, dim, hidden) = {expected}, got {given}")
        if dense.gate_up_bias is not None:
            raise ConfigError("sparse_moe: expected a dense SwiGLU without biases (bias: false), got one with biases")
        slices = self.config.experts, self.hidden
        gate_tdeh, up_tdeh = (matrix.unflatten(2, slices) for matrix in dense.gate_up.chunk(2, dim=2))
        gate_up_tedf = torch.cat([gate_tdeh, up_tdeh], dim=3).transpose(1, 2)
        down_tehd = dense.down.unflatten(1, slices)
        self.shared_gate_up.copy_(gate_up_tedf[:, 0])
        self.shared_down.copy_(down_tehd[:, 0])
        self.gate_up.copy_(gate_up_tedf[:, 1:])
        self.down.copy_(down_tehd[:, 1:])

    def forward(self, x_btd: Tensor, penalties: Penalties = None) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        x_tbd = x_btd.transpose(0, 1)
        logits_tbe, inner_tbf = self._read(x_tbd)
        chosen_tbk = choose(logits_tbe, self.config.active - 1)
        if self.config.gate_norm == "selected":
            gates_tbk = logits_tbe.gather(-1, chosen_tbk).softmax(dim=-1)
        else:
            gates_tbk = logits_tbe.softmax(dim=-1).gather(-1, chosen_tbk)
        if penalties is not None and self.config.balance:
            penalties.append(self.config.balance * balance_loss(logits_tbe, chosen_tbk))
        gate_tbh, up_tbh = inner_tbf.chunk(2, dim=-1)
        shared_tbd = per_token_linear(functional.silu(gate_tbh) * up_tbh, self.shared_down, None)
        scaled_tbk = (self.gate_scale * gates_tbk).to(x_tbd.dtype)
        y_tbd: Tensor
        if self.quantized is None:
            y_tbd = routed_experts(x_tbd, self.gate_up, self.down, chosen_tbk, scaled_tbk, onto=shared_tbd)
        else:
            y_tbd = self.quantized(x_tbd, chosen_tbk, scaled_tbk, onto_tbd=shared_tbd)
        return y_tbd.transpose(0, 1)

    def quantize(self, dtype: torch.dtype) -> None:
        """See `Mixture`."""
        self.quantized = QuantizedExperts(self.gate_up, self.down, dtype)
        del self.gate_up, self.down

    def _read(self, x_tbd: Tensor) -> tuple[Tensor, Tensor]:
        """The router's logits ``[T, B, E - 1]`` and the shared expert's hidden layer before the activation, ``[T, B, 2 h]``."""
        cast = not x_tbd.is_meta and torch.is_autocast_enabled(x_tbd.device.type)
        exact = x_tbd.dtype in (torch.float32, torch.float64) and not cast
        if not exact:
            return router_logits(x_tbd, self.router), per_token_linear(x_tbd, self.shared_gate_up, None)
        # One product, since a router's own has so few columns that it costs as much as one of many.
        both_tbf = per_token_linear(x_tbd, torch.cat([self.router, self.shared_gate_up], dim=2), None)
        logits_tbe, inner_tbf = both_tbf.split([self.config.experts - 1, 2 * self.hidden], dim=2)
        return logits_tbe, inner_tbf

    @property
    def flops(self) -> int:
        """``6 n T D² k / E`` for k experts, and ``2 T D (E - 1)`` for the routers."""
        return self.tokens * self.dim * (6 * self.config.active * self.hidden + 2 * (self.config.experts - 1))

    @property
    def idle(self) -> int:
        """The weights of the E - k experts that a row did not choose."""
        return 3 * self.tokens * self.dim * self.hidden * (self.config.experts - self.config.active)


def balance_loss(logits_tbe: Tensor, chosen_tbk: Tensor) -> Tensor:
    """The Switch Transformer's balance loss (arXiv 2101.03961, eq. 4) per token position, summed over tokens: T where all is even.

    The choices' shares f carry no gradient; the mean probabilities P do.
    """
    tokens, _, experts = logits_tbe.shape
    choices_tn = chosen_tbk.flatten(1)
    ones_tn = torch.ones_like(choices_tn, dtype=logits_tbe.dtype)
    share_te = logits_tbe.new_zeros(tokens, experts).scatter_add(1, choices_tn, ones_tn) / choices_tn.shape[1]
    return experts * (share_te * logits_tbe.softmax(dim=-1).mean(dim=1)).sum()


def _check(config: SparseMoE.Config, hidden: int) -> None:
    if config.active > config.experts:
        raise ConfigError(f"sparse_moe: active: expected at most experts ({config.experts}), got {config.active}")
    if hidden % config.experts:
        raise ConfigError(f"sparse_moe: experts: expected a divisor of the hidden width {hidden} = expansion * dim, got {config.experts}")
    if config.active == 2 and config.gate_norm == "selected":
        raise ConfigError(
            "sparse_moe: gate_norm: 'selected' with active: 2 leaves one routed expert, whose gate is always 1, so that the router gets "
            "no gradient; expected gate_norm: all, or active of at least 3"
        )
