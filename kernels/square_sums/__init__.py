# SPDX-License-Identifier: Apache-2.0
"""Sums of squares as the torch.library op ``recsys::square_sums``, with a fake implementation and a gradient of its own.

A ranker's tokens are at the same time mixed tokens in another order (`recsys.ranking.mixers.token_mix`), and sums of the parts that both
have in common give the RMSNorm of either layout by a small sum along one axis.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from kernels import backend
from kernels.library import define
from kernels.op import KernelSpec, Op, Shape, Work
from kernels.square_sums import cpu, reference

# Batch, tokens, parts of a token, width of a part.
SHAPES: tuple[Shape, ...] = (
    (1, 1, 1, 1),
    (3, 2, 5, 3),
    (7, 3, 1, 5),
    (130, 8, 16, 8),
    (5, 1, 7, 16),
    (2, 9, 3, 33),
    (1, 4, 2, 130),
    (3, 5, 19, 1),
    (2, 3, 11, 8),
    (2, 1, 3, 1000),
)


def square_sums(x: Tensor) -> Tensor:
    """``s[b, t, p] = Σ_i x[b, t, p, i]²``; see `kernels.square_sums.reference`.

    Where x is ``tokens.unflatten(2, (P, w))``, the RMSNorm of a token of width D divides by the root of ``s.sum(2) / D + ε``, and that of a
    mixed token, which holds the same part of every token, by the root of ``s.sum(1) / (T · w) + ε``.

    Args:
        x: ``[B, T, P, w]``, floats, w at least 1. The first three axes may lie in memory anyhow; where the last one does not lie together,
            x is copied.

    Returns:
        ``[B, T, P]``, contiguous, in float32 (float64 for float64). The gradient of x lies in memory as x does.

    Raises:
        ValueError: x has another number of axes, no floats, or parts without numbers.
    """
    if x.ndim != 4:
        raise ValueError(f"x: expected four axes [B, T, P, w], got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: expected floats, got {x.dtype}")
    if x.shape[3] < 1:
        raise ValueError(f"x: expected parts of at least one number, got {tuple(x.shape)}")
    return cast(Tensor, _forward(x if _lies_together(x) else x.contiguous()))


def _lies_together(x: Tensor) -> bool:
    """Whether the last axis does, and still would in a tensor of the same order: not where another axis has steps of one number as well."""
    return x.shape[3] == 1 or (x.stride(3) == 1 and 1 not in x.stride()[:3])


@define("recsys::square_sums")
def _forward(x: Tensor) -> Tensor:
    module = backend.implementation("square_sums", x)
    return reference.square_sums(x).contiguous() if module is None else cast(Tensor, module.forward(x))


@define("recsys::square_sums_backward")
def _backward(dsums: Tensor, x: Tensor) -> Tensor:
    module = backend.implementation("square_sums", x) or cpu
    return cast(Tensor, module.backward(dsums, x))


@_forward.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:3], dtype=torch.promote_types(x.dtype, torch.float32))


@_backward.register_fake
def _(dsums: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: torch.autograd.function.FunctionCtx, dsums: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return cast(Tensor, _backward(dsums, x))


_forward.register_autograd(_gradient, setup_context=_save)


def _in_own_dtype(x: Tensor) -> Tensor:
    """`square_sums` as ops are compared with their references, rounded to the dtype of x."""
    return square_sums(x).to(x.dtype)


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor]:
    """The mixed view of tokens that lie tokens-outermost: ``[B, P, T, w]``."""
    batch, tokens, parts, width = shape
    tokens_tbd = torch.randn(tokens, batch, parts * width, generator=generator).to(dtype)
    return (tokens_tbd.transpose(0, 1).unflatten(2, (parts, width)).transpose(1, 2).requires_grad_(),)


def _specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    from kernels.square_sums import triton_ops

    return triton_ops.specs(shapes)


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """Forward: x in, the sums out. Backward: x and the sums' gradient in, dx out. A product and a sum each, and a product back."""
    numbers, parts = math.prod(shape), math.prod(shape[:3])
    one, sums = numbers * dtype.itemsize, parts * torch.promote_types(dtype, torch.float32).itemsize
    return Work(flops=3 * numbers, read=2 * one + sums, written=one + sums)


OP = Op("square_sums", _in_own_dtype, reference.square_sums, _inputs, SHAPES, small=(2, 3, 2, 4), work=_work, specs=_specs)
