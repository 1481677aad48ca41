# SPDX-License-Identifier: Apache-2.0
"""What every op says of itself, so that one contract test, one benchmark and one ahead-of-time compiler serve them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

Shape = tuple[int, ...]
Result: TypeAlias = Tensor | tuple[Tensor, ...]


def forward_backward(
    call: Callable[..., Result], inputs: Sequence[Any], upstream: Callable[[Tensor], Tensor] = torch.ones_like
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The results of a call, detached, and the gradients of the inputs that ask for one, given an ``upstream`` for each result."""
    found = call(*inputs)
    values = found if isinstance(found, tuple) else (found,)
    leaves = [i for i in inputs if isinstance(i, Tensor) and i.requires_grad]
    asked = [value for value in values if value.requires_grad]
    gradients = torch.autograd.grad(asked, leaves, [upstream(value) for value in asked]) if leaves and asked else ()
    return tuple(value.detach() for value in values), gradients


@dataclass(frozen=True)
class KernelSpec:
    """One specialisation of a Triton kernel, as ``triton.compile`` takes it.

    Attributes:
        name: the kernel and what it is specialised for.
        kernel: the ``@triton.jit`` function.
        signature: argument name → Triton type, ``constexpr`` for compile-time ones.
        constants: the values of the compile-time arguments.
        num_warps: warps of one program.
        num_stages: of the software pipeline.
        tile: rows, columns and depth of a matrix product's tile; None for a kernel without one.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    tile: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Work:
    """What an op must do at a shape, forward and backward, however it is written.

    Attributes:
        flops: floating-point operations of the matrix products; where there are none, of all.
        read: bytes that must come from memory once.
        written: bytes that must go there once.
    """

    flops: int
    read: int
    written: int


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: its name in ``torch.ops.recsys``.
        call: the public function, which chooses a backend; returns a tensor or a tuple of tensors.
        reference: the definition, in plain torch operations, differentiable by autograd.
        inputs: ``(shape, dtype, generator) -> arguments`` for one of the op's shapes, tensors first; those that are differentiated
            require a gradient. ``dtype`` is of the floating ones.
        shapes: shapes for tests, odd ones and the smallest among them; `kernels.shapes` has those of the recipes.
        small: the shape at which gradients are compared with finite differences; None for an op without gradients.
        work: ``(shape, dtype) -> Work``.
        specs: ``(shapes) -> kernel specialisations`` for ahead-of-time compilation; imports Triton.
    """

    name: str
    call: Callable[..., Result]
    reference: Callable[..., Result]
    inputs: Callable[[Shape, torch.dtype, torch.Generator], tuple[Any, ...]]
    shapes: Sequence[Shape]
    small: Shape | None
    work: Callable[[Shape, torch.dtype], Work]
    specs: Callable[[Sequence[Shape]], list[KernelSpec]] = field(default=lambda _: [])
