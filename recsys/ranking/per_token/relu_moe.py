# SPDX-License-Identifier: Apache-2.0
"""The ReLU-routed per-token experts of RankMixer, trained dense and inferred sparse."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from kernels.routed_experts import routed_experts
from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.ranking.part import Penalties
from recsys.ranking.per_token.base import hidden_width, per_token_linear, xavier_uniform_per_token_, zero_bias
from recsys.ranking.per_token.quantized import Mixture, QuantizedExperts
from recsys.ranking.per_token.routing import router_logits

INITIAL_STRENGTH = 1e-8
STEP = 1.2


@register("per_token", "relu_moe")
class ReluMoE(Mixture):
    """The sparse variant of RankMixer's pFFN (arXiv 2507.15551): ``v_t = Σ_j G_tj e_tj(s_t)`` with ``G_tj = relu(h_t(s_t))_j``.

    Each token has E experts of its own, two-layer networks with GELU, and two routers: ``h_train`` and ``h_infer`` ("dense training,
    sparse inference"). An ℓ1 penalty ``λ Σ_t Σ_j G_tj``, on h_infer alone, switches experts off; λ is adapted until the wanted share of
    them is active. In evaluation mode only h_infer counts, and an expert whose gate is zero is not computed.

    Chosen where the paper is silent:

    - how the forward pass of training uses both routers: ``y = ½ (y_train + y_infer)``. With h_train alone, h_infer would get no gradient
      but that of the penalty, and all its gates would go to zero;
    - the task's loss sees only that mean, and is content with a y_infer that is of no use by itself. A second penalty, ``agreement`` ×
      the mean square of ``y_infer - stop_gradient(y_train)``, makes it one. Without it, inference did not learn in our trials;
    - how λ is adapted: ReMoE's controller (arXiv 2412.14711), in each forward pass of training that has a list for penalties: λ ×= 1.2
      where more than the wanted share of h_infer's gates are positive, else λ /= 1.2, from 1e-8 and never below it, so that it does not
      wind down while there is nothing to do. λ is float32 whatever the module's dtype, and each module has its own; ReMoE averages the
      share over layers;
    - an expert's hidden width is ``n D / E``: all together have the parameters of the dense pFFN, plus routers and E - 1 output biases;
    - routers are affine, computed in float32 or better, Xavier-uniform with zero biases, so that gates start in the order of 1.

    Raises:
        ConfigError: E does not divide the hidden width.
    """

    class Config(BaseConfig):
        """Sizes, sparsity and initialisation.

        Attributes:
            expansion: n, the hidden width of all experts of a token together ÷ D.
            experts: E.
            active: the wanted share of positive gates.
            agreement: the weight of the penalty on the distance of y_infer from y_train; without it training saves one product in three.
            balanced: weigh each expert's ℓ1 with how often it is active ÷ ``active``, as ReMoE does, so that busy experts are held back.
            bias: whether the experts have biases.
            down_init: factor on the initial down matrices.
        """

        name: Literal["relu_moe"] = "relu_moe"
        expansion: float = Field(4.0, gt=0)
        experts: int = Field(8, ge=1)
        active: float = Field(0.25, gt=0, le=1)
        agreement: float = Field(1.0, ge=0)
        balanced: bool = False
        bias: bool = True
        down_init: float = Field(1.0, ge=0)

    strength: Tensor

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)
        total = hidden_width(config.expansion, dim)
        if total % config.experts:
            raise ConfigError(f"relu_moe: experts: expected a divisor of the hidden width {total} = expansion * dim, got {config.experts}")
        self.config, self.hidden = config, total // config.experts
        # In training the experts of a token are one wide network, so their matrices lie side by side.
        self.up = nn.Parameter(torch.empty(tokens, dim, total))
        self.down = nn.Parameter(torch.empty(tokens, total, dim))
        self.up_bias = zero_bias(config.bias, tokens, total)
        self.down_bias = nn.Parameter(torch.zeros(tokens, config.experts, dim)) if config.bias else None
        self.train_router = nn.Parameter(torch.empty(tokens, dim, config.experts))
        self.infer_router = nn.Parameter(torch.empty(tokens, dim, config.experts))
        self.train_router_bias = nn.Parameter(torch.zeros(tokens, 1, config.experts))
        self.infer_router_bias = nn.Parameter(torch.zeros(tokens, 1, config.experts))
        self.register_buffer("strength", torch.tensor(INITIAL_STRENGTH, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights; biases become zero. λ stays."""
        xavier_uniform_per_token_(self.up, self.up.shape[2])
        xavier_uniform_per_token_(self.down, self.dim, self.config.down_init)
        for router in (self.train_router, self.infer_router):
            xavier_uniform_per_token_(router, self.config.experts)
        for bias in (self.up_bias, self.down_bias, self.train_router_bias, self.infer_router_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "ReluMoE":
        strength = self.strength
        super()._apply(fn, recurse)
        if self.strength.dtype != torch.float32:  # steps of 1.2 would be lost in bfloat16
            self.strength = strength.to(self.strength.device)
        return self

    def forward(self, x_btd: Tensor, penalties: Penalties = None) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        x_tbd = x_btd.transpose(0, 1)
        gates_tbe = self.gates(x_tbd, self.infer_router, self.infer_router_bias)
        if not self.training:
            return self._sparse(x_tbd, gates_tbe).transpose(0, 1)
        train_gates_tbe = self.gates(x_tbd, self.train_router, self.train_router_bias)
        hidden_tbf = functional.gelu(per_token_linear(x_tbd, self.up, self.up_bias))
        if penalties is not None:
            penalties.append(self._sparsity_penalty(gates_tbe))
        if penalties is None or not self.config.agreement:  # the sum over experts is linear in the gates
            return self._dense(hidden_tbf, 0.5 * (gates_tbe + train_gates_tbe)).transpose(0, 1)
        trained_tbd, inferred_tbd = self._dense(hidden_tbf, train_gates_tbe), self._dense(hidden_tbf, gates_tbe)
        penalties.append(self.config.agreement * functional.mse_loss(inferred_tbd.float(), trained_tbd.detach().float()))
        return (0.5 * (trained_tbd + inferred_tbd)).transpose(0, 1)

    @staticmethod
    def gates(x_tbd: Tensor, weight_tde: Tensor, bias_t1e: Tensor) -> Tensor:
        """A router's gates, at least 0, ``[T, B, E]``."""
        return functional.relu(router_logits(x_tbd, weight_tde, bias_t1e))

    def _dense(self, hidden_tbf: Tensor, gates_tbe: Tensor) -> Tensor:
        """The sum over all experts: a gate scales its expert's part of the hidden layer."""
        hidden_tbeh = hidden_tbf.unflatten(2, (self.config.experts, self.hidden))
        gates_tbe = gates_tbe.to(hidden_tbeh.dtype)
        y_tbd = per_token_linear((hidden_tbeh * gates_tbe.unsqueeze(-1)).flatten(2), self.down, None)
        return y_tbd if self.down_bias is None else y_tbd + torch.bmm(gates_tbe, self.down_bias)

    def _sparse(self, x_tbd: Tensor, gates_tbe: Tensor) -> Tensor:
        """The sum over the experts with positive gates."""
        experts, slices = self.config.experts, (self.config.experts, self.hidden)
        bias_tef = None if self.up_bias is None else self.up_bias.squeeze(1).unflatten(1, slices)
        chosen_tbe = torch.arange(experts, device=x_tbd.device).expand_as(gates_tbe).where(gates_tbe > 0, -1)
        gates_tbe = gates_tbe.to(x_tbd.dtype)
        if self.quantized is None:
            y_tbd = routed_experts(x_tbd, *self._experts(), chosen_tbe, gates_tbe, bias_tef, activation="gelu")
        else:
            y_tbd = self.quantized(x_tbd, chosen_tbe, gates_tbe, bias_tef, activation="gelu")
        return y_tbd if self.down_bias is None else y_tbd + torch.bmm(gates_tbe, self.down_bias)

    def _experts(self) -> tuple[Tensor, Tensor]:
        """The experts' matrices apart, ``[T, E, D, h]`` and ``[T, E, h, D]``."""
        slices = self.config.experts, self.hidden
        return self.up.unflatten(2, slices).transpose(1, 2), self.down.unflatten(1, slices)

    def quantize(self, dtype: torch.dtype) -> None:
        """See `Mixture`."""
        self.quantized = QuantizedExperts(*self._experts(), dtype)
        del self.up, self.down

    def _sparsity_penalty(self, gates_tbe: Tensor) -> Tensor:
        """``λ Σ_t Σ_j G_tj``, the mean over the batch; then λ takes its step."""
        active_tbe = (gates_tbe > 0).to(gates_tbe.dtype)
        load_te = active_tbe.mean(dim=1) / self.config.active if self.config.balanced else 1.0
        penalty = self.strength.clone() * (gates_tbe.mean(dim=1) * load_te).sum()
        with torch.no_grad():
            step = torch.where(active_tbe.mean() > self.config.active, STEP, 1 / STEP)
            self.strength.copy_((self.strength * step).clamp(min=INITIAL_STRENGTH))
        return penalty

    @property
    def flops(self) -> int:
        """In training mode those of the dense pass and both routers; in evaluation mode those with the wanted share of experts active.

        Exact in training mode, but for the second down product that ``agreement`` adds to the loss; in evaluation mode the share is
        what the data make it.
        """
        share, routers = (1.0, 2) if self.training else (self.config.active, 1)
        affine = self.config.experts * (routers + (self.down_bias is not None))
        return 2 * self.tokens * self.dim * affine + round(share * 4 * self.tokens * self.dim * self.config.experts * self.hidden)

    @property
    def idle(self) -> int:
        """In training mode none; in evaluation mode h_train, and the experts but for the wanted share."""
        if self.training:
            return 0
        matrices = 2 * self.tokens * self.dim * self.config.experts * self.hidden
        biases = sum(bias.numel() for bias in (self.up_bias, self.down_bias) if bias is not None)
        return round((1 - self.config.active) * (matrices + biases)) + self.train_router.numel() + self.train_router_bias.numel()
