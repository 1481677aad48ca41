# SPDX-License-Identifier: Apache-2.0
"""FSQ as the torch.library op ``recsys::fsq``, with a fake implementation and a gradient of its own."""

import math
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from kernels import backend
from kernels.fsq import cpu, reference
from kernels.library import define
from kernels.op import KernelSpec, Op, Shape, Work

Form = Literal["tanh", "sigmoid"]

# Items, slots, form (0 tanh, 1 sigmoid), levels.
SHAPES: tuple[Shape, ...] = (
    (1, 1, 0, 3),
    (3, 2, 1, 2, 5),
    (63, 1, 0, 8, 5, 5),
    (100, 4, 1, 8, 8, 8, 6, 5),
    (7, 3, 0, 1000, 4),
    (1000, 2, 0, 8, 5, 5, 5),
    (2, 1, 1, *[3] * 33),
)
_LIMITS = {"tanh": (3, 1000), "sigmoid": (2, 1 << 20)}


def fsq(z: Tensor, levels: Sequence[int], form: Form = "tanh") -> tuple[Tensor, Tensor]:
    """Round d numbers to ``L_1 … L_d`` levels, and number the combination; see `kernels.fsq.reference`.

    Args:
        z: ``[..., d]``, finite.
        levels: ``L_1 … L_d``: 3 to 1,000 each for ``tanh``, 2 to 2^20 for ``sigmoid``.
        form: of the bound.

    Returns:
        ``[..., d]`` the levels within [-1, 1], in the dtype of z, with the gradient of the bound; int64 ``[...]`` the codes.

    Raises:
        ValueError: an unknown form, no levels, too small or too large ones, more codes than an int64 can number, or a z of another width
            or without floating-point numbers.
    """
    if form not in get_args(Form):
        raise ValueError(f"form: expected one of {', '.join(get_args(Form))}, got {form!r}")
    check_levels(levels, form)
    if z.ndim < 1 or z.shape[-1] != len(levels) or not z.is_floating_point():
        raise ValueError(f"z: expected floating-point [..., {len(levels)}], as there are levels, got {z.dtype} of shape {tuple(z.shape)}")
    values, index = _forward(z.reshape(-1, 1, z.shape[-1]).contiguous(), list(levels), form)
    return values.view(z.shape), index.view(z.shape[:-1])


def check_levels(levels: Sequence[int], form: Form) -> None:
    """Hold that there can be these levels.

    Beyond 1,000 of the form ``tanh`` the box is wider by half a step, and what lies in its corners would be rounded to no level; its two
    levels would be -1 and 0.

    Raises:
        ValueError: no levels, too small or too large ones, or more codes than an int64 can number.
    """
    least, most = _LIMITS[form]
    if not levels or min(levels) < least or max(levels) > most:
        raise ValueError(f"levels: expected one or more of {least} to {most} for the form {form!r}, got {list(levels)}")
    if math.prod(levels) >= 1 << 63:
        raise ValueError(f"levels: {list(levels)} make {math.prod(levels)} codes, more than an int64 can number")


@define("recsys::fsq")
def _forward(z: Tensor, levels: Sequence[int], form: str) -> tuple[Tensor, Tensor]:
    module = backend.implementation("fsq", z)
    found = reference.fsq(z, levels, form) if module is None else module.forward(z, levels, form)
    return cast(tuple[Tensor, Tensor], found)


@define("recsys::fsq_backward")
def _backward(dy: Tensor, z: Tensor, levels: Sequence[int], form: str) -> Tensor:
    module = backend.implementation("fsq", z) or cpu
    return cast(Tensor, module.backward(dy.contiguous(), z, levels, form))


@_forward.register_fake
def _(z: Tensor, levels: Sequence[int], form: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), z.new_empty(z.shape[:-1], dtype=torch.int64)


@_backward.register_fake
def _(dy: Tensor, z: Tensor, levels: Sequence[int], form: str) -> Tensor:
    return torch.empty_like(z)


def _save(ctx: Any, inputs: tuple[Tensor, Sequence[int], str], output: tuple[Tensor, Tensor]) -> None:
    z, *ctx.settings = inputs
    ctx.save_for_backward(z)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return _backward(dy, *ctx.saved_tensors, *ctx.settings), None, None


_forward.register_autograd(_gradient, setup_context=_save)


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, list[int], str]:
    items, slots, sigmoid, *levels = shape
    form = "sigmoid" if sigmoid else "tanh"
    z = torch.randn(items, slots, len(levels), generator=generator).to(dtype)
    fraction = reference.bound(z.double(), levels, form) % 1
    z[(fraction - 0.5).abs() < 1e-3] = 0.01  # not so near a tie that float32 may round to the other side
    return z.requires_grad_(), levels, form


def _specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    from kernels.fsq import triton_ops

    return triton_ops.specs(shapes)


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """Forward: z in, levels and codes out. Backward: z and the gradient in, the gradient out. A dozen operations on a number each way."""
    items, slots, _, *levels = shape
    one = items * slots * len(levels) * dtype.itemsize
    return Work(flops=24 * items * slots * len(levels), read=3 * one, written=2 * one + 8 * items * slots)


OP = Op("fsq", fsq, reference.fsq, _inputs, SHAPES, small=None, work=_work, specs=_specs)
