# SPDX-License-Identifier: Apache-2.0
"""Per-token SwiGLU in Triton's interpreter: without scale and residual, in other memory layouts, parted, and without rows."""

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.testing import error_ratio, unwritten_is_nan
from kernels.token_swiglu import OP, token_swiglu, triton_ops
from kernels.token_swiglu.operands import Matrices
from recsys.ranking.mixers.token_mix import mix, revert


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


@pytest.mark.parametrize("shape", [(9, 2, 20, 12, 4), (3, 3, 7, 5, 7), (5, 1, 32, 6, 2), (70, 2, 72, 5, 24), (2, 2, 160, 5, 2)], ids=str)
def test_parted_tokens_are_mixing_and_reverting_without_a_copy(shape: tuple[int, ...]) -> None:
    batch, heads, dim, _, tokens = shape
    _, gate_up, down, scale, _ = OP.inputs(shape, torch.float32, torch.Generator().manual_seed(0))
    x, onto, upstream = (torch.randn(tokens, batch, heads * dim // tokens).transpose(0, 1).requires_grad_() for _ in range(3))
    leaves = (x, onto, gate_up, down, scale)
    expected = revert(token_swiglu(mix(x, heads), gate_up, down, scale, mix(onto, heads)), tokens)
    with backend.use("triton"), unwritten_is_nan():
        parted, kept = (one.unflatten(2, (heads, -1)).transpose(1, 2) for one in (x, onto))
        found = token_swiglu(parted, gate_up, down, scale, kept).transpose(1, 2).flatten(2)
        found_gradients = torch.autograd.grad(found, leaves, upstream)
    assert found.transpose(0, 1).is_contiguous() and found_gradients[0].transpose(0, 1).is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(found_gradients, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_scale_and_residual_can_be_left_out_of_parted_tokens(scaled: bool, added: bool) -> None:
    x, gate_up, down, scale, residual = OP.inputs((9, 2, 20, 12, 4), torch.float32, torch.Generator().manual_seed(0))
    compare((x, gate_up, down, scale if scaled else None, residual if added else None), 4e-6)


@pytest.mark.parametrize("shape", [(9, 2, 20, 12, 4), (9, 3, 16, 12, 2)], ids=str)
def test_parted_tokens_may_lie_anyhow(shape: tuple[int, ...]) -> None:
    """Batch outermost, parts beside a gap, numbers apart, and an upstream gradient turned round."""
    x, gate_up, down, scale, residual = OP.inputs(shape, torch.float32, torch.Generator().manual_seed(0))
    batch, tokens, parts, width = x.shape
    gap = torch.zeros(batch, tokens, parts, width + 3)[..., 1:-2].copy_(x.detach()).requires_grad_()
    apart = torch.stack((x.detach(), x.detach()), -1)[..., 0].requires_grad_()
    turned = torch.randn(width, parts, tokens, batch).permute(3, 2, 1, 0)

    def run(x: Tensor, residual: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = (x, gate_up, down, scale)
        value = token_swiglu(x, gate_up, down, scale, residual)
        return value, *torch.autograd.grad(value, leaves, upstream)

    with backend.use("triton"):
        expected = run(x, residual, turned.contiguous())
        for other in (x.detach().contiguous().requires_grad_(), gap, apart):
            found = run(other, residual.contiguous(), turned)
            assert all(torch.equal(one, theirs) and one.stride() == theirs.stride() for one, theirs in zip(found, expected, strict=True))


def test_mixed_tokens_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = OP.inputs((3, 2, 16, 5, 2), torch.float32, torch.Generator().manual_seed(0))
    rows, seen = triton_ops.token_rows, []

    def watched(x: Tensor) -> Matrices:
        seen.append(rows(x).memory is x)
        return rows(x)

    monkeypatch.setattr(triton_ops, "token_rows", watched)
    with backend.use("triton"):
        torch.autograd.grad(token_swiglu(*inputs), inputs, torch.randn_like(inputs[0]))
    assert seen == [True] * 6  # x, y, the residual; then x, dy, dx


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
