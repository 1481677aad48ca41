# SPDX-License-Identifier: Apache-2.0
"""How a fast implementation is compared with its reference."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kernels.op import Op, Result, Shape, forward_backward

# Of values; gradients get twice as much, since the upstream gradient is rounded to the dtype as well.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_FLOOR = 1e-3  # a result that is all but zero is compared absolutely


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest whole number, so that an element that nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def most_held(call: Callable[[], object]) -> int:
    """Bytes of tensors that ``call`` held at most at a time, by torch's own record of allocations on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    held = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def error_ratio(value: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the expected value; NaN stays NaN, and nothing has no error."""
    if not expected.numel():
        return 0.0
    error = (value.double() - expected.double()).square().mean().sqrt()
    return float(error / expected.double().square().mean().sqrt().clamp_min(_FLOOR))


def assert_matches_reference(op: Op, shape: Shape, dtype: torch.dtype) -> None:
    """Values and gradients of ``op.call`` in ``dtype`` against the reference in float64 on the same inputs; whole numbers must be equal.

    Raises:
        AssertionError: names what differs, by how much, and what is allowed.
    """
    inputs = op.inputs(shape, dtype, torch.Generator().manual_seed(0))
    wide = tuple(_wide(i) for i in inputs)
    values, gradients = _run(op.call, inputs, dtype)
    expected, expected_gradients = _run(op.reference, wide, dtype)
    where = f"{op.name} {shape} {dtype}"
    assert len(values) == len(expected) and len(gradients) == len(expected_gradients)
    for place, (value, wanted) in enumerate(zip(values, expected, strict=True)):
        _check(f"{where}: value" + (f" {place}" if len(values) > 1 else ""), value, wanted, dtype, TOLERANCE[dtype])
    for place, (gradient, wanted) in enumerate(zip(gradients, expected_gradients, strict=True)):
        _check(f"{where}: gradient {place}", gradient, wanted, dtype, 2 * TOLERANCE[dtype])


def _wide(given: Any) -> Any:
    """An input as the reference gets it: floating ones in float64."""
    if not isinstance(given, Tensor) or not given.is_floating_point():
        return given
    return given.detach().double().requires_grad_(given.requires_grad)


def _run(call: Callable[..., Result], inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The results, and the gradients of the inputs for drawn gradients of the results, rounded to ``dtype``."""
    random = torch.Generator().manual_seed(7)
    return forward_backward(call, inputs, lambda value: torch.randn(value.shape, generator=random).to(dtype).to(value.dtype))


def _check(what: str, value: Tensor, expected: Tensor, dtype: torch.dtype, allowed: float) -> None:
    if not value.is_floating_point():
        if value.dtype != expected.dtype or not torch.equal(value, expected):
            raise AssertionError(f"{what}: whole numbers differ, or their dtype: {value.dtype}, expected {expected.dtype}")
        return
    ratio = error_ratio(value, expected)
    if value.dtype != dtype or not ratio <= allowed:
        raise AssertionError(f"{what}: error ratio {ratio:.2e} in {value.dtype}, expected at most {allowed:.0e} in {dtype}")
