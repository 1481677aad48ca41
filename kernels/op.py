# SPDX-License-Identifier: Apache-2.0
"""What every op says of itself, so that one contract test, one benchmark and one ahead-of-time compiler serve them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class KernelSpec:
    """One specialisation of a Triton kernel, as ``triton.compile`` takes it.

    Attributes:
        name: the kernel and what it is specialised for.
        kernel: the ``@triton.jit`` function.
        signature: argument name → Triton type, ``constexpr`` for compile-time ones.
        constants: the values of the compile-time arguments.
        num_warps: warps of one program.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: its name in ``torch.ops.recsys``.
        call: the public function, which chooses a backend.
        reference: the definition, in plain torch operations, differentiable by autograd.
        inputs: ``(shape, dtype, generator) -> arguments`` for one of the op's shapes; floating tensors require a gradient.
        shapes: shapes for tests, odd ones among them; `kernels.shapes` has those of the recipes.
        dtypes: the dtypes it takes.
        specs: ``(shapes) -> kernel specialisations`` for ahead-of-time compilation; imports Triton.
    """

    name: str
    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: Callable[[Shape, torch.dtype, torch.Generator], tuple[Any, ...]]
    shapes: Sequence[Shape]
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
    specs: Callable[[Sequence[Shape]], list[KernelSpec]] = field(default=lambda _: [])
