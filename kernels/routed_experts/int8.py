# SPDX-License-Identifier: Apache-2.0
"""Routed experts with int8 weights as the torch.library op ``recsys::routed_experts_int8``: the forward pass alone.

A request brings so few rows to each expert that on a GPU reading the weights is what takes time; a byte for each is half of bfloat16's. On
the CPU they are widened before each product, which saves memory and no time: a fifth to a half more of it than float32 weights take.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import backend
from kernels.library import define
from kernels.op import KernelSpec, Op, Shape, Work
from kernels.routed_experts import check_dtypes, check_shapes, count_pairs, draw, pair_flops, pairs_of, reference
from kernels.routed_experts.reference import Activation

SHAPES: tuple[Shape, ...] = ((1, 1, 3, 5, 1, 1, 0), (2, 9, 5, 7, 3, 2, 0), (3, 20, 63, 33, 4, 3, 1), (1, 100, 20, 65, 5, 3, 0))
LARGEST = 127


def quantize_experts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights as ``scale · q``, with a scale for each column so large that its largest weight is 127 of them.

    The error of a weight is at most half a scale. For normal weights it is 0.6% to 0.8% of them (root mean square, columns of 64 to 1,536),
    and with both matrices in int8 that of an expert's output 1.0% to 1.4% for SwiGLU and 0.9% to 1.1% for GELU.

    Args:
        weight: ``[..., K, N]``, of a floating dtype.

    Returns:
        q, int8 ``[..., K, N]``, and the scales of the N columns, float32 ``[..., N]``.

    Raises:
        ValueError: the weight is not floating, or has fewer than two axes.
    """
    if not weight.is_floating_point() or weight.ndim < 2:
        raise ValueError(f"weight: expected [..., K, N] of a floating dtype, got {weight.dtype} of shape {tuple(weight.shape)}")
    wide = weight.detach().float()
    scale = wide.abs().amax(-2) / LARGEST
    q = (wide / scale.where(scale > 0, 1.0).unsqueeze(-2)).round()
    return q.to(torch.int8), scale


def routed_experts_int8(
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
    """`kernels.routed_experts.routed_experts` with weights of `quantize_experts`, and without a gradient. Autocast leaves it alone.

    Args:
        x: ``[T, B, D]``.
        weight_in: int8 ``[T, E, D, F]``.
        weight_out: int8 ``[T, E, h, D]``.
        chosen: int64 ``[T, B, k]``; a negative one is none.
        gates: ``[T, B, k]``, the dtype of ``x``.
        scale_in: float32 ``[T, E, F]``.
        scale_out: float32 ``[T, E, D]``.
        bias: ``[T, E, F]``, the dtype of ``x``, or None.
        onto: ``[T, B, D]``, the dtype of ``x``, or None.
        activation: "swiglu" or "gelu".

    Returns:
        ``[T, B, D]``, contiguous. Products are formed of the int8 numbers in the dtype of ``x``, and scaled.

    Raises:
        ValueError: a shape, a dtype or the activation does not fit, or (on the CPU) a choice is not an expert.
    """
    check_shapes(x, weight_in, weight_out, chosen, gates, bias, onto, activation)
    check_dtypes(x.dtype, {"gates": gates, "bias": bias, "onto": onto})
    check_dtypes(torch.int8, {"weight_in": weight_in, "weight_out": weight_out})
    check_dtypes(torch.float32, {"scale_in": scale_in, "scale_out": scale_out})
    for name, scale, weight in (("scale_in", scale_in, weight_in), ("scale_out", scale_out, weight_out)):
        wanted = (*weight.shape[:2], weight.shape[3])
        if scale.shape != wanted:
            raise ValueError(f"{name}: expected shape {wanted}, got {tuple(scale.shape)}")
    found = _forward(x, weight_in, weight_out, chosen, gates, scale_in, scale_out, bias, onto, activation)
    return cast(Tensor, found)


@define("recsys::routed_experts_int8")
def _forward(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    chosen: Tensor,
    gates: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
    bias: Tensor | None,
    onto: Tensor | None,
    activation: str,
) -> Tensor:
    module = backend.implementation("routed_experts", x, weight_in)
    given, scales = (x, weight_in, weight_out, chosen, gates), (scale_in, scale_out)
    if module is None:
        return reference.routed_experts_int8(*given, *scales, bias, onto, cast(Activation, activation)).contiguous()
    return cast(Tensor, module.forward(*given, bias, onto, activation, False, scales)[0])


@_forward.register_fake
def _(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    chosen: Tensor,
    gates: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
    bias: Tensor | None,
    onto: Tensor | None,
    activation: str,
) -> Tensor:
    return x.new_empty(x.shape)


@register_flop_formula(torch.ops.recsys.routed_experts_int8, get_raw=True)
def _flops(x: Tensor, weight_in: Tensor, weight_out: Tensor, chosen: Tensor, *_: Any, **__: Any) -> int:
    return count_pairs(chosen) * pair_flops(weight_in, weight_out)


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    drawn = (one.detach() if isinstance(one, Tensor) else one for one in draw(shape, dtype, generator))
    x, weight_in, weight_out, chosen, gates, bias, onto, activation = drawn
    (q_in, scale_in), (q_out, scale_out) = quantize_experts(weight_in), quantize_experts(weight_out)
    return x, q_in, q_out, chosen, gates, scale_in, scale_out, bias, onto, activation


def _specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    from kernels.routed_experts import triton_ops

    return triton_ops.int8_specs(shapes)


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """x, onto, gates, choices, both weights and their scales, and the bias in; y out."""
    tokens, batch, dim, hidden, experts, choices, gelu = shape
    width = hidden if gelu else 2 * hidden
    rows, gates = (tokens * batch * size * dtype.itemsize for size in (dim, choices))
    weights = tokens * experts * (dim * width + hidden * dim + 4 * (width + dim) + width * dtype.itemsize)
    flops = 2 * pairs_of(shape) * (dim * width + hidden * dim)
    return Work(flops, read=2 * rows + weights + gates + 8 * tokens * batch * choices, written=rows)


OP = Op("routed_experts_int8", routed_experts_int8, reference.routed_experts_int8, _inputs, SHAPES, small=None, work=_work, specs=_specs)
