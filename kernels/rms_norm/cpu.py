# SPDX-License-Identifier: Apache-2.0
"""RMSNorm on the CPU: one statistic per row is kept for the backward pass, instead of the widened input that autograd would keep."""

import torch
from torch import Tensor


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x [M, N]`` → ``y [M, N]`` and the reciprocal root mean square ``[M]`` of each row."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.linalg.vector_norm(wide, dim=-1).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = wide * scale[:, None]
    return y.mul_(weight.to(wide.dtype)).to(x.dtype), scale


def backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x [M, N]`` and of ``weight [N]``.

    With x̂ = x·scale and g = dy·γ: dx = scale · (g − x̂ · mean(g·x̂)) and dγ = Σ_rows dy·x̂.
    """
    wide = scale.dtype
    normed = x.to(wide) * scale[:, None]
    dy_wide = dy.to(wide)
    dweight = (dy_wide * normed).sum(0)  # as an einsum it would be a product of columns, many times slower
    g = dy_wide * weight.to(wide)
    inner = torch.einsum("mn,mn->m", g, normed).div_(x.shape[-1])
    dx = torch.addcmul(g, normed, inner[:, None], value=-1).mul_(scale[:, None])
    return dx.to(x.dtype), dweight.to(weight.dtype)
