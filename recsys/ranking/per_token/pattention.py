# SPDX-License-Identifier: Apache-2.0
"""Per-token attention to learned pairs (TokenFormer), of which a trained ranker can be given more."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.efficiency.growth.tokenformer import replace_parameter, unit_scores
from recsys.ranking.part import Penalties
from recsys.ranking.per_token.base import PerToken, hidden_width, per_token_linear, xavier_uniform_per_token_


@register("per_token", "pattention")
class PerTokenPattention(PerToken):
    """``y_t = gelu(tau s_t / ‖s_t‖₂) V_t`` with ``s_t = x_t K_tᵀ``: a token's own n pairs in the place of its network (arXiv 2410.23168).

    TokenFormer's feed-forward layer is one such attention with pairs that all tokens share; one set for each token is ours, as in the
    other per-token networks. `grow` appends pairs with zero keys, so that the ranker says what it said before: see
    `recsys.efficiency.growth.tokenformer.Pattention` for why, and for tau, which stays √n of the first construction.

    Keys and values start as the matrices of a `SwiGLU` do: Xavier-uniform with fans per token, the values times ``down_init``.
    """

    tau: Tensor

    class Config(BaseConfig):
        """Sizes and initialisation.

        Attributes:
            expansion: pairs ÷ D, at first.
            down_init: factor on the initial values; small, so that a new block is nearly the identity.
            eps: scores of a smaller norm give zeros.
        """

        name: Literal["pattention"] = "pattention"
        expansion: float = Field(2.0, gt=0)
        down_init: float = Field(0.1, ge=0)
        eps: float = Field(1e-6, gt=0)

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)
        self.config = config
        pairs = hidden_width(config.expansion, dim)
        self.key, self.value = (nn.Parameter(torch.empty(pairs, tokens, dim)) for _ in range(2))  # pairs first: they grow
        self.register_buffer("tau", torch.tensor(float(pairs) ** 0.5))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new keys and values."""
        xavier_uniform_per_token_(self.key.data.permute(1, 2, 0), self.pairs)
        xavier_uniform_per_token_(self.value.data.transpose(0, 1), self.dim, self.config.down_init)

    @property
    def pairs(self) -> int:
        """How many pairs each token has now."""
        return len(self.key)

    def forward(self, x_btd: Tensor, penalties: Penalties = None) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        scores_tbn = per_token_linear(x_btd.transpose(0, 1), self.key.permute(1, 2, 0), None)
        weights_tbn = functional.gelu(unit_scores(scores_tbn, self.config.eps) * self.tau.to(scores_tbn.dtype))
        return per_token_linear(weights_tbn, self.value.transpose(0, 1), None).transpose(0, 1)

    @torch.no_grad()
    def grow(self, pairs: int) -> None:
        """Append so many pairs to every token's, in place; results stay what they are.

        Optimisers follow by `recsys.efficiency.growth.tokenformer.grow_optimizer_state`.

        Raises:
            ConfigError: ``pairs`` is negative.
        """
        if pairs < 0:
            raise ConfigError(f"grow: pairs: expected at least 0, got {pairs!r}")
        values = self.value.new_empty(pairs, self.tokens, self.dim)
        xavier_uniform_per_token_(values.transpose(0, 1), self.dim, self.config.down_init)
        replace_parameter(self.key, torch.cat((self.key, torch.zeros_like(values))))
        replace_parameter(self.value, torch.cat((self.value, values)))

    @property
    def flops(self) -> int:
        """``4 n T D``: scores and results."""
        return 4 * self.tokens * self.dim * self.pairs

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        """A checkpoint of another size sets the size."""
        key, value = (state_dict.get(prefix + name) for name in ("key", "value"))
        if isinstance(key, Tensor) and isinstance(value, Tensor) and key.shape == value.shape and len(key) != self.pairs:
            for parameter in (self.key, self.value):
                replace_parameter(parameter, parameter.detach().new_zeros(len(key), *parameter.shape[1:]))
        super()._load_from_state_dict(state_dict, prefix, *others)  # type: ignore[arg-type]


def grow(model: nn.Module, factor: float) -> int:
    """Give every per-token pattention of a ranker ``factor`` times its pairs; what the ranker says stays the same.

    Returns:
        The pairs that were added, over all tokens and layers.

    Raises:
        ConfigError: there is none in the model, or the factor is below 1.
    """
    if factor < 1:
        raise ConfigError(f"grow: factor: expected at least 1, got {factor!r}")
    found = [module for module in model.modules() if isinstance(module, PerTokenPattention)]
    if not found:
        raise ConfigError("grow: expected a model whose per_token is 'pattention', got none")
    added = 0
    for module in found:
        pairs = round(module.pairs * (factor - 1))
        module.grow(pairs)
        added += pairs * module.tokens
    return added
