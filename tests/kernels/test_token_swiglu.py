# SPDX-License-Identifier: Apache-2.0
"""Per-token SwiGLU: the model's own part as an oracle, what scale and residual mean, and errors."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.testing import error_ratio
from kernels.token_swiglu import OP, cpu, token_swiglu
from recsys.ranking.per_token import SwiGLU

B, T, D, H = 6, 3, 8, 5


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return OP.inputs((B, T, D, H), dtype, torch.Generator().manual_seed(0))


def test_equals_the_part_of_the_model_in_values_and_gradients() -> None:
    torch.manual_seed(0)
    part = SwiGLU(SwiGLU.Config(expansion=1.5, down_init=1.0), T, D)
    x = torch.randn(B, T, D, requires_grad=True)
    given, upstream = (x, part.gate_up, part.down), torch.randn(B, T, D)
    value, expected = token_swiglu(*given), part(x)
    torch.testing.assert_close(value, expected)
    assert value.stride() == expected.stride()
    for mine, theirs in zip(torch.autograd.grad(value, given, upstream), torch.autograd.grad(expected, given, upstream), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_row_scale_is_a_norm_whose_gain_is_folded_into_the_weights() -> None:
    x, gate_up, down, _, _ = drawn(torch.float64)
    gain = 1 + torch.rand(D, dtype=torch.float64)
    scale = torch.rsqrt(x.square().mean(-1) + 1e-6)
    expected = token_swiglu(functional.rms_norm(x, (D,), gain, 1e-6), gate_up, down)
    torch.testing.assert_close(token_swiglu(x, gain[:, None] * gate_up, down, scale), expected)


def test_the_residual_is_added_and_gets_the_gradient_as_it_is() -> None:
    x, gate_up, down, scale, residual = drawn()
    upstream = torch.randn(B, T, D)
    value = token_swiglu(x, gate_up, down, scale, residual)
    torch.testing.assert_close(value, residual + token_swiglu(x, gate_up, down, scale))
    assert torch.equal(torch.autograd.grad(value, residual, upstream)[0], upstream)


def test_tokens_do_not_see_each_other() -> None:
    x, gate_up, down, scale, _ = (i.detach() for i in drawn())
    value = token_swiglu(x, gate_up, down, scale)
    for t in range(T):
        one = slice(t, t + 1)
        torch.testing.assert_close(value[:, one], token_swiglu(x[:, one], gate_up[one], down[one], scale[:, one]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_scale_of_half_precision_gets_a_float32_gradient(dtype: torch.dtype) -> None:
    x, gate_up, down, scale, residual = drawn(dtype)
    scale.requires_grad_()
    (found,) = torch.autograd.grad(token_swiglu(x, gate_up, down, scale, residual).sum(), scale)
    wide = [i.detach().double() for i in (x, gate_up, down, scale, residual)]
    wide[3].requires_grad_()
    (expected,) = torch.autograd.grad(OP.reference(*wide).sum(), wide[3])
    assert found.dtype == torch.float32
    assert error_ratio(found, expected) < 2e-2


def test_forming_the_product_again_gives_the_same_gradients() -> None:
    x, gate_up, down, scale, _ = (i.detach() for i in drawn())
    dy = torch.randn(B, T, D)
    _, product = cpu.forward(x, gate_up, down, scale, None)
    kept = cpu.backward(dy, x, gate_up, down, scale, product)
    again = cpu.backward(dy, x, gate_up, down, scale, product[..., :0])
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_a_scale_of_zero_leaves_the_residual_and_no_gradient() -> None:
    x, gate_up, down, _, residual = drawn()
    scale = torch.zeros(B, T, requires_grad=True)
    value = token_swiglu(x, gate_up, down, scale, residual)
    assert torch.equal(value, residual)
    for gradient in torch.autograd.grad(value.sum(), (x, gate_up, down, scale)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_no_rows_are_no_error_and_give_weights_no_gradient() -> None:
    x, gate_up, down, scale, residual = drawn()
    value = token_swiglu(x[:0], gate_up, down, scale[:0], residual[:0])
    assert value.shape == (0, T, D)
    for gradient in torch.autograd.grad(value.sum(), (gate_up, down)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.ones(B, D), r"x, down: expected three axes each, got \(6, 8\)"),
        (1, torch.ones(T, D, H), r"gate_up: expected torch.float32 of shape \(3, 8, 10\), got torch.float32 of shape \(3, 8, 5\)"),
        (2, torch.ones(T, H, D, dtype=torch.float64), r"down: expected torch.float32 of shape \(3, 5, 8\), got torch.float64"),
        (3, torch.ones(B, T, 1), r"scale: expected torch.float32 of shape \(6, 3\), got torch.float32 of shape \(6, 3, 1\)"),
        (4, torch.ones(B, T, D + 1), r"residual: expected torch.float32 of shape \(6, 3, 8\), got torch.float32 of shape \(6, 3, 9\)"),
    ],
)
def test_an_input_that_does_not_fit_is_an_error_that_names_it(place: int, wrong: Tensor, message: str) -> None:
    given = list(drawn())
    given[place] = wrong
    with pytest.raises(ValueError, match=message):
        token_swiglu(*given)
