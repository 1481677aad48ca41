# SPDX-License-Identifier: Apache-2.0
"""Per-token SwiGLU: the model's own part as an oracle, what scale and residual mean, parted tokens, and errors."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from kernels import backend
from kernels.testing import error_ratio
from kernels.token_swiglu import OP, cpu, token_swiglu
from recsys.ranking.mixers.token_mix import mix, revert
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


MIXED = [(6, 3, 8, 5, 2), (5, 3, 4, 5, 4), (4, 2, 9, 3, 3), (3, 4, 6, 5, 1), (1, 3, 20, 4, 4), (2, 1, 6, 4, 2), (1, 1, 6, 4, 2)]


def mixed_by_view(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def outermost(*sizes: int) -> Tensor:
    """``[B, T, D]``, tokens-outermost."""
    batch, tokens, dim = sizes
    return torch.randn(tokens, batch, dim).transpose(0, 1).requires_grad_()


@pytest.mark.parametrize("way", ["reference", "cpu", "native"])
@pytest.mark.parametrize("shape", MIXED, ids=str)
def test_parted_tokens_are_mixing_and_reverting_without_a_copy(shape: tuple[int, ...], way: backend.Backend) -> None:
    batch, heads, dim, _, tokens = shape
    _, gate_up, down, scale, _ = OP.inputs(shape, torch.float32, torch.Generator().manual_seed(0))
    x, onto = (outermost(batch, tokens, heads * dim // tokens) for _ in range(2))
    upstream, leaves = torch.randn_like(x), (x, onto, gate_up, down, scale)
    expected = revert(token_swiglu(mix(x, heads), gate_up, down, scale, mix(onto, heads)), tokens)
    with backend.use(way):
        parted = token_swiglu(mixed_by_view(x, heads), gate_up, down, scale, mixed_by_view(onto, heads))
        found = parted.transpose(1, 2).flatten(2)
        gradients = torch.autograd.grad(found, leaves, upstream)
    assert found.data_ptr() == parted.data_ptr() and found.transpose(0, 1).is_contiguous()
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert gradients[0].transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("shape", MIXED, ids=str)
def test_results_of_parted_tokens_lie_parts_outermost(shape: tuple[int, ...]) -> None:
    x, *rest = OP.inputs(shape, torch.float32, torch.Generator().manual_seed(0))
    batch, tokens, parts, width = x.shape
    value = token_swiglu(x, *rest)
    upstream = torch.randn(width, parts, tokens, batch).permute(3, 2, 1, 0)
    for one in (value, torch.autograd.grad(value, x, upstream)[0]):
        assert one.shape == x.shape and one.stride() == (tokens * width, width, batch * tokens * width, 1)


def test_parted_tokens_may_lie_anyhow() -> None:
    x, gate_up, down, scale, residual = (i.detach() for i in OP.inputs(MIXED[0], torch.float32, torch.Generator().manual_seed(0)))
    expected = token_swiglu(x, gate_up, down, scale, residual)
    wide = functional.pad(x, (1, 2))[..., 1:-2]
    spread = torch.stack((residual, residual), -1)[..., 0]
    torch.testing.assert_close(token_swiglu(x.contiguous(), gate_up, down, scale, spread), expected)
    torch.testing.assert_close(token_swiglu(wide, gate_up, down, scale, residual.contiguous()), expected)


@pytest.mark.parametrize("shape", MIXED[:4], ids=str)
def test_torch_library_accepts_parted_tokens(shape: tuple[int, ...]) -> None:
    result = torch.library.opcheck(torch.ops.recsys.token_swiglu.default, OP.inputs(shape, torch.float32, torch.Generator().manual_seed(0)))
    assert set(result.values()) == {"SUCCESS"}


def test_compilers_see_parted_tokens_and_where_results_lie() -> None:
    torch._dynamo.reset()
    inputs = OP.inputs(MIXED[0], torch.float32, torch.Generator().manual_seed(0))
    eager, upstream = token_swiglu(*inputs), torch.randn(6, 3, 2, 4)
    compiled = torch.compile(token_swiglu, backend="aot_eager", fullgraph=True)(*inputs)
    assert compiled.stride() == eager.stride()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, inputs, upstream), torch.autograd.grad(eager, inputs, upstream))


def test_gradients_of_parted_tokens_match_finite_differences() -> None:
    inputs = OP.inputs((3, 2, 4, 3, 2), torch.float64, torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(token_swiglu, inputs)


def test_autocast_takes_parted_tokens_as_they_lie() -> None:
    x, gate_up, down, scale, residual = (i.detach() for i in OP.inputs(MIXED[0], torch.float32, torch.Generator().manual_seed(0)))
    with torch.autocast("cpu", torch.bfloat16):
        found = token_swiglu(x, gate_up, down, scale, residual)
    x, gate_up, down, residual = (i.to(torch.bfloat16) for i in (x, gate_up, down, residual))
    assert torch.equal(found, token_swiglu(x, gate_up, down, scale, residual)) and found.stride() == x.stride()


@pytest.mark.parametrize("shape", [(6, 3, 8, 5), MIXED[0]], ids=str)
def test_flops_are_those_of_the_three_products(shape: tuple[int, ...]) -> None:
    inputs = OP.inputs(shape, torch.float32, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        token_swiglu(*inputs).sum().backward()
    assert counter.get_total_flops() == OP.work(shape, torch.float32).flops == 18 * 6 * 3 * 8 * 5


def test_no_rows_of_parted_tokens_are_no_error() -> None:
    x, gate_up, down, scale, residual = OP.inputs(MIXED[0], torch.float32, torch.Generator().manual_seed(0))
    value = token_swiglu(x[:0], gate_up, down, scale[:0], residual[:0])
    assert value.shape == (0, 3, 2, 4)
    for gradient in torch.autograd.grad(value.sum(), (gate_up, down)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_residual_must_be_parted_as_the_tokens_are() -> None:
    x, gate_up, down, scale, residual = OP.inputs(MIXED[0], torch.float32, torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=r"residual: expected torch.float32 of shape \(6, 3, 2, 4\), got torch.float32 of shape \(6, 3, 8\)"
    ):
        token_swiglu(x, gate_up, down, scale, residual.flatten(2))
    with pytest.raises(ValueError, match=r"gate_up: expected torch.float32 of shape \(3, 6, 10\), got torch.float32 of shape \(3, 8, 10\)"):
        token_swiglu(x[..., :3], gate_up, down, scale, residual)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.ones(B, D), r"x: expected three axes, or four of parted tokens, got \(6, 8\)"),
        (2, torch.ones(T, H), r"down: expected three axes, got \(3, 5\)"),
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
