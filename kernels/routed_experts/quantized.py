# SPDX-License-Identifier: Apache-2.0
"""Routed experts with weights of a byte as the torch.library op ``recsys::routed_experts_quantized``: the forward pass alone.

A request brings so few rows to each expert that on a GPU reading the weights is what takes time; a byte for each is half of bfloat16's. On
the CPU they are widened before each product, which saves memory and no time.

The bytes are int8, or float8 (e4m3). Among weights of like size int8 is nearer; where a column has some that are far larger than the rest,
float8 is, which keeps digits and not places. Float8 is read as the bits that it is, so that a GPU needs no instructions for it: sm_80 has
none.
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

SHAPES: tuple[Shape, ...] = (
    *((1, 1, 3, 5, 1, 1, 0, 1), (2, 9, 5, 7, 3, 2, 0, 0), (3, 20, 63, 33, 4, 3, 1, 0), (3, 20, 63, 33, 4, 3, 1, 1)),
    *((1, 100, 20, 65, 5, 3, 0, 0), (1, 100, 20, 65, 5, 3, 0, 1)),
)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_experts(weight: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Weights as ``scale · q``, with a scale for each column so large that its largest weight is the largest number of ``dtype``.

    With int8 the error of a weight is at most half a scale: for normal weights 0.6% to 0.8% of them (root mean square, columns of 64 to
    1,536), and with both matrices that of an expert's output 1.0% to 1.4% for SwiGLU and 0.8% to 1.1% for GELU. With float8 it is at most a
    sixteenth of the weight (and 2⁻¹⁰ of a scale): 2.5% to 2.6% of normal ones, and 4.1% to 4.6% and 3.4% to 3.8% of the outputs.

    Args:
        weight: ``[..., K, N]``, of a floating dtype.
        dtype: int8 or float8_e4m3fn.

    Returns:
        q, of ``dtype``, ``[..., K, N]``, and the scales of the N columns, float32 ``[..., N]``.

    Raises:
        ValueError: the weight is not floating, not finite, or has fewer than two axes; or there is no such dtype.
    """
    if dtype not in LARGEST:
        raise ValueError(f"dtype: expected torch.int8 or torch.float8_e4m3fn, got {dtype}")
    if not weight.is_floating_point() or weight.ndim < 2:
        raise ValueError(f"weight: expected [..., K, N] of a floating dtype, got {weight.dtype} of shape {tuple(weight.shape)}")
    wide = weight.detach().float()
    if not wide.isfinite().all():
        raise ValueError(f"weight: expected finite numbers, got {int((~wide.isfinite()).sum())} others")
    scale = wide.abs().amax(-2) / LARGEST[dtype]
    q = wide / scale.where(scale > 0, 1.0).unsqueeze(-2)
    return (q.round() if dtype == torch.int8 else q).to(dtype), scale


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
    """`kernels.routed_experts.routed_experts` with weights of `quantize_experts`, and without a gradient. Autocast leaves it alone.

    Args:
        x: ``[T, B, D]``.
        weight_in: int8 or float8_e4m3fn ``[T, E, D, F]``.
        weight_out: ``[T, E, h, D]``, of the same dtype.
        chosen: int64 ``[T, B, k]``; a negative one is none.
        gates: ``[T, B, k]``, the dtype of ``x``.
        scale_in: float32 ``[T, E, F]``.
        scale_out: float32 ``[T, E, D]``.
        bias: ``[T, E, F]``, the dtype of ``x``, or None.
        onto: ``[T, B, D]``, the dtype of ``x``, or None.
        activation: "swiglu" or "gelu".

    Returns:
        ``[T, B, D]``, contiguous. Products are formed of their numbers in the dtype of ``x``, and scaled.

    Raises:
        ValueError: a shape, a dtype or the activation does not fit, or (on the CPU) a choice is not an expert.
    """
    check_shapes(x, weight_in, weight_out, chosen, gates, bias, onto, activation)
    check_dtypes(x.dtype, {"gates": gates, "bias": bias, "onto": onto})
    if weight_in.dtype not in LARGEST:
        raise ValueError(f"weight_in: expected torch.int8 or torch.float8_e4m3fn, got {weight_in.dtype}")
    check_dtypes(weight_in.dtype, {"weight_out": weight_out})
    check_dtypes(torch.float32, {"scale_in": scale_in, "scale_out": scale_out})
    for name, scale, weight in (("scale_in", scale_in, weight_in), ("scale_out", scale_out, weight_out)):
        wanted = (*weight.shape[:2], weight.shape[3])
        if scale.shape != wanted:
            raise ValueError(f"{name}: expected shape {wanted}, got {tuple(scale.shape)}")
    found = _forward(x, weight_in, weight_out, chosen, gates, scale_in, scale_out, bias, onto, activation)
    return cast(Tensor, found)


@define("recsys::routed_experts_quantized")
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
        return reference.routed_experts_quantized(*given, *scales, bias, onto, cast(Activation, activation)).contiguous()
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


@register_flop_formula(torch.ops.recsys.routed_experts_quantized, get_raw=True)
def _flops(x: Tensor, weight_in: Tensor, weight_out: Tensor, chosen: Tensor, *_: Any, **__: Any) -> int:
    return count_pairs(chosen) * pair_flops(weight_in, weight_out)


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    *sizes, fp8 = shape
    drawn = (one.detach() if isinstance(one, Tensor) else one for one in draw(tuple(sizes), dtype, generator))
    x, weight_in, weight_out, chosen, gates, bias, onto, activation = drawn
    dtype_of_weights = torch.float8_e4m3fn if fp8 else torch.int8
    (q_in, scale_in), (q_out, scale_out) = (quantize_experts(one, dtype_of_weights) for one in (weight_in, weight_out))
    return x, q_in, q_out, chosen, gates, scale_in, scale_out, bias, onto, activation


def _specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    from kernels.routed_experts import triton_ops

    return triton_ops.quantized_specs(shapes)


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """x, onto, gates, choices, both weights and their scales, and the bias in; y out."""
    tokens, batch, dim, hidden, experts, choices, gelu, _ = shape
    width = hidden if gelu else 2 * hidden
    rows, gates = (tokens * batch * size * dtype.itemsize for size in (dim, choices))
    weights = tokens * experts * (dim * width + hidden * dim + 4 * (width + dim) + width * dtype.itemsize)
    flops = 2 * pairs_of(shape[:-1]) * (dim * width + hidden * dim)
    return Work(flops, read=2 * rows + weights + gates + 8 * tokens * batch * choices, written=rows)


OP = Op(
    "routed_experts_quantized",
    routed_experts_quantized,
    reference.routed_experts_quantized,
    _inputs,
    SHAPES,
    small=None,
    work=_work,
    specs=_specs,
)
