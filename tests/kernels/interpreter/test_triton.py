# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in Triton's interpreter, in a process of their own with TRITON_INTERPRET=1 (`make test` starts it)."""

import os

import pytest
import torch

from kernels import backend
from kernels.op import Op
from kernels.registry import OPS
from kernels.testing import assert_matches_reference, unwritten_is_nan

CASES = [pytest.param(op, shape, id=f"{op.name}-{'x'.join(map(str, shape))}") for op in OPS for shape in op.shapes]


def test_the_interpreter_is_on() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "shape"), CASES)
def test_triton_equals_the_reference_in_values_and_gradients(op: Op, shape, dtype) -> None:
    with backend.use("triton"), unwritten_is_nan():
        assert_matches_reference(op, shape, dtype)


def test_many_rows_are_shared_by_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The partial sums of the weight's gradient, with more rows than programs and a last program that gets none."""
    from kernels.rms_norm import rms_norm, triton_ops

    monkeypatch.setattr(triton_ops, "MAX_PROGRAMS", 3)
    monkeypatch.setattr(triton_ops, "_TILE", 32)
    x = torch.randn(13, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    upstream = torch.randn(13, 8)
    expected = torch.autograd.grad(torch.nn.functional.rms_norm(x, (8,), weight, 1e-6), (x, weight), upstream)
    with backend.use("triton"):
        found = torch.autograd.grad(rms_norm(x, weight), (x, weight), upstream)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
