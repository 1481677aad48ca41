# SPDX-License-Identifier: Apache-2.0
"""Routed experts: every row of a token is sent through the experts chosen for it, and their outputs are summed with weights.

An expert is ``act(x W_in + b_in) W_out``, with ``act`` the exact GELU (RankMixer, arXiv 2507.15551), or for ``swiglu``
``silu(first half) ⊙ second half`` (the sparse mixture of TokenMixer-Large, arXiv 2602.06563, eqs. 20-21).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Activation = Literal["swiglu", "gelu"]


def routed_experts(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    chosen: Tensor,
    gates: Tensor,
    bias: Tensor | None = None,
    onto: Tensor | None = None,
    activation: Activation = "swiglu",
) -> Tensor:
    """The definition, ``y[t, b] = onto[t, b] + Σ_j gates[t, b, j] · expert[t, chosen[t, b, j]](x[t, b])``: all experts, masked.

    Args:
        x: ``[T, B, D]``, float32, bfloat16, float16 or float64.
        weight_in: ``[T, E, D, F]``; F is h, and for ``swiglu`` 2 h.
        weight_out: ``[T, E, h, D]``.
        chosen: int64 ``[T, B, k]``, the experts of each row; a negative one is none.
        gates: ``[T, B, k]``.
        bias: ``[T, E, F]``. None for 0.
        onto: ``[T, B, D]``. None for 0.
        activation: see above.

    Returns:
        ``[T, B, D]`` in the dtype of ``x``. Everything is computed in float32 (float64 for float64).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x_tbd, y = x.to(wide), torch.zeros(x.shape, dtype=wide, device=x.device) if onto is None else onto.to(wide)
    for expert in range(weight_in.shape[1]):
        inner = torch.bmm(x_tbd, weight_in[:, expert].to(wide))
        if bias is not None:
            inner = inner + bias[:, expert, None].to(wide)
        gate_tb1 = (gates.to(wide) * (chosen == expert)).sum(-1, keepdim=True)
        y = y + gate_tb1 * torch.bmm(_activate(inner, activation), weight_out[:, expert].to(wide))
    return y.to(x.dtype)


def routed_experts_quantized(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    chosen: Tensor,
    gates: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
    bias: Tensor | None = None,
    onto: Tensor | None = None,
    activation: Activation = "swiglu",
) -> Tensor:
    """`routed_experts` with the weights ``scale · q``.

    Args:
        x: see `routed_experts`, as all that is not named here.
        weight_in: q, int8 or float8 ``[T, E, D, F]``.
        weight_out: q, int8 or float8 ``[T, E, h, D]``.
        chosen: see ``x``.
        gates: see ``x``.
        scale_in: of each column of ``weight_in``, float32 ``[T, E, F]``.
        scale_out: of each column of ``weight_out``, float32 ``[T, E, D]``.
        bias: see ``x``.
        onto: see ``x``.
        activation: see ``x``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    w_in = weight_in.to(wide) * scale_in.to(wide).unsqueeze(-2)
    w_out = weight_out.to(wide) * scale_out.to(wide).unsqueeze(-2)
    return routed_experts(x, w_in, w_out, chosen, gates, bias, onto, activation)


def _activate(inner: Tensor, activation: str) -> Tensor:
    """``[..., F]`` → ``[..., h]``."""
    if activation == "gelu":
        return functional.gelu(inner)
    gate, up = inner.chunk(2, dim=-1)
    return functional.silu(gate) * up
