# SPDX-License-Identifier: Apache-2.0
"""Per-token SwiGLU on the CPU: batched products over tokens.

The product with ``gate_up`` is kept for the backward pass, and nothing else of the hidden width; autograd of the reference would keep
its scaled halves, silu(g) and silu(g)·u as well. Forming it again, as the GPU does, would cost 2/9 more operations, and a core is short
of those before it is short of memory. Elementwise work is done in the dtype of the product, or in float32 where there is a scale.
"""

import torch
from torch import Tensor
from torch.nn import functional


def forward(x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x [B, T, D]`` → ``y [B, T, D]``, tokens-outermost in memory, and ``x @ gate_up`` as ``[T, B, 2H]``."""
    product = torch.bmm(x.transpose(0, 1), gate_up)
    gate, up = _scaled(product, scale)
    hidden = functional.silu(gate).mul_(up).to(x.dtype)
    y = torch.bmm(hidden, down) if residual is None else torch.baddbmm(residual.transpose(0, 1), hidden, down)
    return y.transpose(0, 1), product


def backward(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, product: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``gate_up``, ``down`` and ``scale``, the last one empty where there is no scale.

    With dh = dy @ downᵀ: dg = dh · u · silu′(g) and du = dh · silu(g), in which the scale is a factor like any other:
    ds = Σ_H (dg · g + du · u) / s, taken before the scaling.

    Args:
        dy: ``[B, T, D]``.
        x: ``[B, T, D]``.
        gate_up: ``[T, D, 2H]``.
        down: ``[T, H, D]``.
        scale: ``[B, T]`` or None.
        product: ``x @ gate_up`` as ``[T, B, 2H]``, or without columns, which has it formed again.
    """
    x_tbd, dy_tbd = x.transpose(0, 1), dy.transpose(0, 1)
    if not product.shape[-1]:
        product = torch.bmm(x_tbd, gate_up)
    gate, up = _scaled(product, scale)
    silu = functional.silu(gate)
    ddown = torch.bmm((silu * up).to(x.dtype).transpose(1, 2), dy_tbd)
    dhidden = torch.bmm(dy_tbd, down.transpose(1, 2))
    dgate = torch.ops.aten.silu_backward(dhidden * up, gate)
    dproduct = torch.cat((dgate, silu.mul_(dhidden)), dim=-1)
    dscale = dproduct.new_empty(0)
    if scale is not None:
        dscale = torch.einsum("tbh,tbh->bt", dproduct, product.to(scale.dtype)).contiguous()
        dproduct = dproduct.mul_(scale.t()[..., None]).to(x.dtype)
    dx = torch.bmm(dproduct, gate_up.transpose(1, 2)).transpose(0, 1)
    return dx, torch.bmm(x_tbd.transpose(1, 2), dproduct), ddown, dscale


def _scaled(product_tbh: Tensor, scale_bt: Tensor | None) -> tuple[Tensor, Tensor]:
    """g and u, ``[T, B, H]`` each."""
    gate, up = product_tbh.chunk(2, dim=-1)
    if scale_bt is None:
        return gate, up
    scale = scale_bt.t()[..., None]
    return gate * scale, up * scale
