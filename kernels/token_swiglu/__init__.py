# SPDX-License-Identifier: Apache-2.0
"""Per-token SwiGLU as the torch.library op ``recsys::token_swiglu``, with a fake implementation and a gradient of its own."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import backend
from kernels.library import define
from kernels.op import KernelSpec, Op, Shape, Work
from kernels.token_swiglu import cpu, reference
from kernels.token_swiglu.layout import rows, unwritten

# B, T, D, H of whole tokens, and with P of parted ones
SHAPES: tuple[Shape, ...] = (
    *((1, 1, 3, 5), (3, 2, 5, 7), (7, 3, 63, 33), (65, 2, 100, 129), (2, 1, 1000, 20), (130, 1, 33, 65)),
    *((3, 2, 6, 7, 2), (4, 3, 7, 5, 7), (6, 2, 9, 4, 1), (1, 4, 20, 10, 4), (70, 2, 66, 65, 2), (5, 2, 144, 66, 9)),
)


def token_swiglu(x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """``r + (silu(g) ⊙ u) @ down`` with ``[g, u] = s · (x @ gate_up)``, with weights of its own for each token.

    See `kernels.token_swiglu.reference`. A token may lie in P parts of w numbers, D = P·w, so that TokenMixer's mixed tokens need no copy:
    see `kernels.token_swiglu.layout`. All axes of ``x`` and ``residual`` but the last may have any strides. Under autocast everything but
    the scale takes autocast's dtype.

    Args:
        x: ``[B, T, D]`` or ``[B, T, P, w]``.
        gate_up: ``[T, D, 2H]``, its rows in the order (part, within), the dtype of ``x``.
        down: ``[T, H, D]``, its columns in the same order, the dtype of ``x``.
        scale: s, ``[B, T]``, float32 (float64 where ``x`` is), or None.
        residual: r, the shape and the dtype of ``x``, or None.

    Returns:
        The shape of ``x``; three axes tokens-outermost in memory, four axes parts-outermost: ``[P, B, T, w]`` is contiguous.

    Raises:
        ValueError: a shape or a dtype does not fit.
    """
    if x.ndim not in (3, 4):
        raise ValueError(f"x: expected three axes, or four of parted tokens, got {tuple(x.shape)}")
    if down.ndim != 3:
        raise ValueError(f"down: expected three axes, got {tuple(down.shape)}")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    batch, tokens, *parts = x.shape
    dim, hidden = math.prod(parts), down.shape[1]
    _check("gate_up", gate_up, (tokens, dim, 2 * hidden), x.dtype)
    _check("down", down, (tokens, hidden, dim), x.dtype)
    if scale is not None:
        _check("scale", scale, (batch, tokens), torch.promote_types(x.dtype, torch.float32))
    if residual is not None:
        _check("residual", residual, tuple(x.shape), x.dtype)
    return cast(Tensor, _forward(x, gate_up, down, scale, residual)[0])


def _check(name: str, given: Tensor, shape: Shape, dtype: torch.dtype) -> None:
    if given.shape != shape or given.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype} of shape {shape}, got {given.dtype} of shape {tuple(given.shape)}")


def _kept_width(x: Tensor, gate_up: Tensor) -> int:
    """Columns of the product ``x @ gate_up`` that are kept for the backward pass: all on the CPU, none where Triton forms it again."""
    return gate_up.shape[2] if x.device.type == "cpu" and not backend.interpreting() else 0


@define("recsys::token_swiglu")
def _forward(x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    module, kept = backend.implementation("token_swiglu", x), bool(_kept_width(x, gate_up))
    if module is not None:
        y, product = module.forward(x, gate_up, down, scale, residual)
    else:
        y = unwritten(x).copy_(reference.token_swiglu(x, gate_up, down, scale, residual))
        product = torch.bmm(rows(x), gate_up) if kept else None
    return y, product if kept else x.new_empty(x.shape[1], x.shape[0], 0)


@define("recsys::token_swiglu_backward")
def _backward(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, product: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = backend.implementation("token_swiglu", x) or cpu
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], module.backward(dy, x, gate_up, down, scale, product))


@_forward.register_fake
def _(x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return unwritten(x), x.new_empty(x.shape[1], x.shape[0], _kept_width(x, gate_up))


@_backward.register_fake
def _(dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, product: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dscale = x.new_empty(0) if scale is None else scale.new_empty(scale.shape)
    return unwritten(x), x.new_empty(gate_up.shape), x.new_empty(down.shape), dscale


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gate_up, down, scale, residual = inputs
    ctx.save_for_backward(x, gate_up, down, scale, output[1])
    ctx.has_residual = residual is not None  # type: ignore[attr-defined]


def _gradient(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, gate_up, down, scale, product = ctx.saved_tensors  # type: ignore[attr-defined]
    dx, dgate_up, ddown, dscale = _backward(dy, x, gate_up, down, scale, product)
    return dx, dgate_up, ddown, None if scale is None else dscale, dy if ctx.has_residual else None  # type: ignore[attr-defined]


_forward.register_autograd(_gradient, setup_context=_save)


@register_flop_formula(torch.ops.recsys.token_swiglu)
def _forward_flops(x: Shape, gate_up: Shape, down: Shape, *_: Any, **__: Any) -> int:
    """Of the three matrices' products."""
    return 6 * math.prod(x) * down[1]


@register_flop_formula(torch.ops.recsys.token_swiglu_backward)
def _backward_flops(dy: Shape, x: Shape, gate_up: Shape, down: Shape, *_: Any, **__: Any) -> int:
    """Two products for each of the forward pass; those that some forms make a second time are not counted."""
    return 2 * _forward_flops(x, gate_up, down)


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """All five. The scale asks for a gradient where it has the dtype of the others.

    Whole tokens lie tokens-outermost; parted ones are the mixed tokens of a tensor ``[B, P, T·w]`` that does.
    """
    batch, tokens, dim, hidden = shape[:4]

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    def drawn_tokens() -> Tensor:
        if len(shape) == 4:
            return drawn(tokens, batch, dim).to(dtype).transpose(0, 1)
        parts = shape[4]
        return drawn(parts, batch, tokens, dim // parts).to(dtype).permute(1, 2, 0, 3)

    x, residual = (drawn_tokens().requires_grad_() for _ in range(2))
    gate_up = drawn(tokens, dim, 2 * hidden).div_(dim**0.5).to(dtype).requires_grad_()
    down = drawn(tokens, hidden, dim).div_(hidden**0.5).to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    scale = (0.5 + torch.rand(batch, tokens, generator=generator)).to(wide).requires_grad_(dtype == wide)
    return x, gate_up, down, scale, residual


def _specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    from kernels.token_swiglu import triton_ops

    return triton_ops.specs(shapes)


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """Three matrices, three products each. Forward: x, r, s and the weights in, y out. Backward: dy and again x, s, the weights in."""
    batch, tokens, dim, hidden = shape[:4]
    numbers, weights = batch * tokens * dim * dtype.itemsize, 3 * tokens * dim * hidden * dtype.itemsize
    scales = 4 * batch * tokens
    return Work(
        flops=18 * batch * tokens * dim * hidden, read=4 * numbers + 2 * weights + 2 * scales, written=2 * numbers + weights + scales
    )  # fmt: skip


OP = Op("token_swiglu", token_swiglu, reference.token_swiglu, _inputs, SHAPES, small=(3, 2, 4, 3), work=_work, specs=_specs)
