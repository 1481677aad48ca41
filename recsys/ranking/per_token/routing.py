# SPDX-License-Identifier: Apache-2.0
"""What per-token mixtures of experts share before `kernels.routed_experts`: the router's logits and the choice."""

import torch
from torch import Tensor

from recsys.ranking.per_token.base import per_token_linear


def router_logits(x_tbd: Tensor, weight_tde: Tensor, bias_t1e: Tensor | None = None) -> Tensor:
    """The logits ``[T, B, E]`` of each token's router, in float32 or better whatever the dtype of the input, under autocast too."""
    dtype = torch.promote_types(x_tbd.dtype, torch.float32)
    with torch.autocast(x_tbd.device.type, enabled=False):
        return per_token_linear(x_tbd.to(dtype), weight_tde.to(dtype), None if bias_t1e is None else bias_t1e.to(dtype))


def choose(logits_tbe: Tensor, count: int) -> Tensor:
    """The ``count`` experts with the highest logits, int64 ``[T, B, count]``, best first; of equal logits the one with the lower index."""
    return torch.sort(logits_tbe, dim=-1, descending=True, stable=True).indices[..., :count]
