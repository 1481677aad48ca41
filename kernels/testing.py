# SPDX-License-Identifier: Apache-2.0
"""How a fast implementation is compared with its reference."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.op import Op, Shape

# Of values; gradients get twice as much, since the upstream gradient is rounded to the dtype as well.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_FLOOR = 1e-3  # a result that is all but zero is compared absolutely


def error_ratio(value: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the expected value; NaN stays NaN."""
    error = (value.double() - expected.double()).square().mean().sqrt()
    return float(error / expected.double().square().mean().sqrt().clamp_min(_FLOOR))


def assert_matches_reference(op: Op, shape: Shape, dtype: torch.dtype) -> None:
    """Values and gradients of ``op.call`` in ``dtype`` against the reference in float64 on the same inputs.

    Raises:
        AssertionError: names what differs, by how much, and what is allowed.
    """
    inputs = op.inputs(shape, dtype, torch.Generator().manual_seed(0))
    wide = tuple(i.detach().double().requires_grad_(i.requires_grad) if isinstance(i, Tensor) else i for i in inputs)
    value, gradients = _run(op.call, inputs, dtype)
    expected, expected_gradients = _run(op.reference, wide, dtype)
    _check(f"{op.name} {shape} {dtype}: value", value, expected, dtype, TOLERANCE[dtype])
    for place, (gradient, wanted) in enumerate(zip(gradients, expected_gradients, strict=True)):
        _check(f"{op.name} {shape} {dtype}: gradient {place}", gradient, wanted, dtype, 2 * TOLERANCE[dtype])


def _run(call: Callable[..., Tensor], inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = call(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype).to(out.dtype)
    leaves = [i for i in inputs if isinstance(i, Tensor) and i.requires_grad]
    return out.detach(), torch.autograd.grad(out, leaves, upstream)


def _check(what: str, value: Tensor, expected: Tensor, dtype: torch.dtype, allowed: float) -> None:
    ratio = error_ratio(value, expected)
    if value.dtype != dtype or not ratio <= allowed:
        raise AssertionError(f"{what}: error ratio {ratio:.2e} in {value.dtype}, expected at most {allowed:.0e} in {dtype}")
