# SPDX-License-Identifier: Apache-2.0
"""Per-token SwiGLU on the CPU: batched products over tokens.

The product with ``gate_up`` is kept for the backward pass, and nothing else of the hidden width; autograd of the reference would keep
its scaled halves, silu(g) and silu(g)·u as well. Forming it again, as the GPU does, would cost 2/9 more operations, and a core is short
of those before it is short of memory. Elementwise work is done in the dtype of the product, or in float32 where there is a scale.

The products want a token's numbers together, so that parted tokens are gathered before them, and a result is parted after.
"""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.token_swiglu.layout import in_form_of, rows


def forward(x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x``, of either form, → ``y`` in the same, see `kernels.token_swiglu.layout`, and ``x @ gate_up`` as ``[T, B, 2H]``."""
    x_tbd = rows(x)
    product = torch.bmm(x_tbd, gate_up)
    gate, up = _scaled(product, scale)
    hidden = functional.silu(gate).mul_(up).to(x.dtype)
    y = torch.bmm(hidden, down) if residual is None else torch.baddbmm(x_tbd if residual is x else rows(residual), hidden, down)
    return in_form_of(x, y), product


def backward(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, product: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``gate_up``, ``down`` and ``scale``, the last one empty where there is no scale.

    With dh = dy @ downᵀ: dg = dh · u · silu′(g) and du = dh · silu(g), in which the scale is a factor like any other:
    ds = Σ_H (dg · g + du · u) / s, taken before the scaling.

    Args:
        dy: the shape of ``x``.
        x: ``[B, T, D]`` or ``[B, T, P, w]``.
        gate_up: ``[T, D, 2H]``.
        down: ``[T, H, D]``.
        scale: ``[B, T]`` or None.
        product: ``x @ gate_up`` as ``[T, B, 2H]``, or without columns, which has it formed again.
    """
    x_tbd, dy_tbd = rows(x), rows(dy)
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
    dx = in_form_of(x, torch.bmm(dproduct, gate_up.transpose(1, 2)))
    return dx, torch.bmm(x_tbd.transpose(1, 2), dproduct), ddown, dscale


def _scaled(product_tbh: Tensor, scale_bt: Tensor | None) -> tuple[Tensor, Tensor]:
    """g and u, ``[T, B, H]`` each."""
    gate, up = product_tbh.chunk(2, dim=-1)
    if scale_bt is None:
        return gate, up
    scale = scale_bt.t()[..., None]
    return gate * scale, up * scale
