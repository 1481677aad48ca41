# SPDX-License-Identifier: Apache-2.0
"""RMSNorm as the torch.library op ``recsys::rms_norm``, with a fake implementation and a gradient of its own."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from kernels import backend
from kernels.library import define
from kernels.op import KernelSpec, Op, Shape, Work
from kernels.rms_norm import cpu, reference

SHAPES: tuple[Shape, ...] = ((1, 3), (3, 5), (7, 63), (5, 123), (64, 64), (2, 1000), (33, 96))


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``γ · x / sqrt(mean(x²) + ε)`` over the last axis; see `kernels.rms_norm.reference`.

    Args:
        x: ``[..., N]``.
        weight: γ, ``[N]``, the dtype of ``x``.
        eps: ε.

    Raises:
        ValueError: the width or the dtype of ``weight`` is not that of ``x``.
    """
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(f"weight: expected {x.dtype} of shape {tuple(x.shape[-1:])}, got {weight.dtype} of shape {tuple(weight.shape)}")
    if x.dim() == 2:  # small ones feel a view that is none
        return cast(Tensor, _forward(x.contiguous(), weight.contiguous(), eps)[0])
    y, _ = _forward(x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous(), eps)
    return cast(Tensor, y.view(x.shape))


@define("recsys::rms_norm")
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    module = backend.implementation("rms_norm", x)
    if module is not None:
        return cast(tuple[Tensor, Tensor], module.forward(x, weight, eps))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return reference.rms_norm(x, weight, eps), torch.rsqrt(wide.square().mean(-1) + eps)


@define("recsys::rms_norm_backward")
def _backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    module = backend.implementation("rms_norm", x) or cpu
    return cast(tuple[Tensor, Tensor], module.backward(dy.contiguous(), x, weight, scale))


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _gradient(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, scale = ctx.saved_tensors  # type: ignore[attr-defined]
    dx, dweight = _backward(dy, x, weight, scale)
    return dx, dweight, None


_forward.register_autograd(_gradient, setup_context=_save)


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    weight = (1 + 0.1 * torch.randn(shape[-1], generator=generator)).to(dtype).requires_grad_()
    return x, weight, 1e-6


def _specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    from kernels.rms_norm import triton_ops

    return triton_ops.specs(shapes)


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """Forward: x in, y out. Backward: x and dy in, dx out. A product, a sum and a scaling each way and back."""
    rows, width = math.prod(shape[:-1]), shape[-1]
    one = rows * width * dtype.itemsize
    return Work(flops=14 * rows * width, read=3 * one, written=2 * one)


OP = Op("rms_norm", rms_norm, reference.rms_norm, _inputs, SHAPES, small=(3, 17), work=_work, specs=_specs)
