# SPDX-License-Identifier: Apache-2.0
"""Per-token SwiGLU in Triton's interpreter: without scale and residual, in other memory layouts, and without rows."""

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.testing import error_ratio
from kernels.token_swiglu import OP, token_swiglu


def gradients(given: tuple[Tensor | None, ...], call) -> tuple[Tensor, ...]:
    value = call(*given)
    leaves = [i for i in given if i is not None and i.requires_grad]
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(5)).to(value.dtype)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream)


def compare(given: tuple[Tensor | None, ...], allowed: float) -> None:
    wide = tuple(None if i is None else i.detach().double().requires_grad_(i.requires_grad) for i in given)
    with backend.use("triton"):
        found = gradients(given, token_swiglu)
    for mine, theirs in zip(found, gradients(wide, OP.reference), strict=True):
        assert error_ratio(mine, theirs) < allowed


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_scale_and_residual_can_be_left_out(scaled: bool, added: bool) -> None:
    x, gate_up, down, scale, residual = OP.inputs((9, 2, 20, 12), torch.float32, torch.Generator().manual_seed(0))
    compare((x, gate_up, down, scale if scaled else None, residual if added else None), 4e-6)


def test_the_scale_of_half_precision_gets_its_gradient() -> None:
    inputs = OP.inputs((9, 2, 20, 150), torch.bfloat16, torch.Generator().manual_seed(0))
    inputs[3].requires_grad_()
    compare(inputs, 2e-2)


def test_batch_outermost_and_broken_up_tensors_give_the_same() -> None:
    inputs = tuple(i.detach() for i in OP.inputs((9, 2, 20, 12), torch.float32, torch.Generator().manual_seed(0)))
    x, gate_up, down, scale, residual = inputs
    spread = torch.stack((x, torch.zeros_like(x)), -1)[..., 0]
    turned = gate_up.transpose(1, 2).contiguous().transpose(1, 2)
    with backend.use("triton"):
        expected = token_swiglu(*inputs)
        assert torch.equal(token_swiglu(x.contiguous(), turned, down, scale.t().contiguous().t(), residual.contiguous()), expected)
        assert torch.equal(token_swiglu(spread, gate_up, down, scale, residual), expected)


def test_more_row_tiles_than_a_group_are_each_formed_once() -> None:
    compare(OP.inputs((128 * 8 + 70, 1, 3, 70), torch.float32, torch.Generator().manual_seed(0)), 4e-6)


def test_a_scale_of_zero_gets_no_gradient() -> None:
    x, gate_up, down, scale, _ = OP.inputs((4, 1, 6, 5), torch.float32, torch.Generator().manual_seed(0))
    scale = torch.zeros_like(scale, requires_grad=True)
    with backend.use("triton"):
        (found,) = torch.autograd.grad(token_swiglu(x, gate_up, down, scale).sum(), scale)
    assert torch.equal(found, torch.zeros_like(found))


def test_no_rows_give_weights_no_gradient() -> None:
    x, gate_up, down, scale, residual = OP.inputs((4, 2, 6, 5), torch.float32, torch.Generator().manual_seed(0))
    with backend.use("triton"):
        value = token_swiglu(x[:0], gate_up, down, scale[:0], residual[:0])
        found = torch.autograd.grad(value.sum(), (gate_up, down))
    assert value.shape == (0, 2, 6)
    assert all(torch.equal(one, torch.zeros_like(one)) for one in found)
