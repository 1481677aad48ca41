# SPDX-License-Identifier: Apache-2.0
"""Routed experts beside a loop over rows, with and without what can be left out; torch and the op; weights of a byte; C++; errors."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from kernels import backend
from kernels.op import forward_backward
from kernels.routed_experts import OP, cpu, draw, native, pairs_of, routed_experts
from kernels.routed_experts.quantized import OP as QUANTIZED
from kernels.routed_experts.quantized import quantize_experts, routed_experts_quantized

T, B, D, H, E, K = 3, 9, 8, 5, 4, 2
FLOAT8 = torch.float8_e4m3fn


def drawn(dtype: torch.dtype = torch.float64, gelu: int = 0, shape: tuple[int, ...] = (T, B, D, H, E, K)) -> tuple[Any, ...]:
    return draw((*shape, gelu), dtype, torch.Generator().manual_seed(0))


def by_hand(x: Tensor, w_in: Tensor, w_out: Tensor, chosen: Tensor, gates: Tensor, bias: Any, onto: Any, activation: str) -> Tensor:
    """One row after another, one choice after another."""
    rows = []
    for t in range(x.shape[0]):
        for b in range(x.shape[1]):
            y = torch.zeros(x.shape[2], dtype=x.dtype) if onto is None else onto[t, b]
            for j, e in enumerate(chosen[t, b].tolist()):
                if e >= 0:
                    inner = x[t, b] @ w_in[t, e] + (0 if bias is None else bias[t, e])
                    gate, up = inner.chunk(2)[0], inner.chunk(2)[-1]
                    hidden = 0.5 * inner * (1 + torch.erf(inner / 2**0.5)) if activation == "gelu" else gate * torch.sigmoid(gate) * up
                    y = y + gates[t, b, j] * (hidden @ w_out[t, e])
            rows.append(y)
    return torch.stack(rows).view(x.shape)


def gradients(value: Tensor, given: tuple[Any, ...]) -> tuple[Tensor, ...]:
    upstream = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(value, [one for one in given if isinstance(one, Tensor) and one.requires_grad], upstream)


@pytest.mark.parametrize("gelu", [0, 1])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_equals_a_loop_over_rows_in_values_and_gradients(gelu: int, biased: bool, added: bool) -> None:
    x, w_in, w_out, chosen, gates, bias, onto, activation = drawn(gelu=gelu)
    chosen[1] = -1  # a token without choices
    given = (x, w_in, w_out, chosen, gates, bias if biased else None, onto if added else None, activation)
    value, expected = routed_experts(*given), by_hand(*given)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(OP.reference(*given), expected)
    for mine, theirs in zip(gradients(value, given), gradients(expected, given), strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(routed_experts(*given), expected)


def test_the_drawn_arguments_have_rows_with_fewer_choices_and_experts_without_rows() -> None:
    _, _, _, chosen, *_ = drawn()
    assert int((chosen >= 0).sum()) == pairs_of((T, B, D, H, E, K, 0)) < chosen.numel()
    assert E - 1 not in chosen[0]
    assert int(chosen.max()) == E - 1


def test_a_choice_made_twice_counts_twice() -> None:
    x, w_in, w_out, chosen, gates, bias, onto, activation = drawn()
    twice = torch.cat((chosen[..., :1], chosen[..., :1]), -1)
    once = gates.sum(-1, keepdim=True)
    expected = routed_experts(x, w_in, w_out, chosen[..., :1], once, bias, onto, activation)
    torch.testing.assert_close(routed_experts(x, w_in, w_out, twice, gates, bias, onto, activation), expected)


def test_the_order_of_choices_does_not_matter() -> None:
    x, w_in, w_out, chosen, gates, bias, onto, activation = drawn()
    flipped = routed_experts(x, w_in, w_out, chosen.flip(-1), gates.flip(-1), bias, onto, activation)
    torch.testing.assert_close(flipped, routed_experts(x, w_in, w_out, chosen, gates, bias, onto, activation))


def test_experts_without_rows_get_no_gradient_and_rows_without_experts_give_none() -> None:
    given = drawn()
    chosen = given[3]
    chosen[:, 4] = -1
    dx, dw_in, dw_out, dgates, dbias, donto = gradients(routed_experts(*given), given)
    idle = torch.ones(T, E, dtype=torch.bool)
    for t in range(T):
        idle[t, chosen[t][chosen[t] >= 0]] = False
    assert idle.any()
    assert not idle.all()
    for gradient in (dw_in, dw_out, dbias):
        assert torch.equal(gradient.flatten(2).abs().amax(2) == 0, idle)
    assert torch.equal(dgates == 0, chosen < 0)
    assert torch.equal(dx.abs().amax(2) == 0, (chosen < 0).all(-1))
    assert donto.abs().amin() > 0


@pytest.mark.parametrize(("batch", "choices"), [(0, K), (B, 0)])
def test_no_rows_and_no_choices_are_no_error(batch: int, choices: int) -> None:
    x, w_in, w_out, chosen, gates, bias, onto, activation = drawn()
    x, onto, chosen, gates = x[:, :batch], onto[:, :batch], chosen[:, :batch, :choices], gates[:, :batch, :choices]
    value = routed_experts(x, w_in, w_out, chosen, gates, bias, onto, activation)
    assert torch.equal(value, onto)
    for gradient in torch.autograd.grad(value.sum(), (w_in, w_out, bias)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_forming_the_inner_layer_again_gives_the_same_gradients() -> None:
    x, w_in, w_out, chosen, gates, bias, onto, activation = (one.detach() if isinstance(one, Tensor) else one for one in drawn())
    dy = torch.randn(T, B, D, dtype=torch.float64)
    _, inner, order, offsets = cpu.forward(x, w_in, w_out, chosen, gates, bias, onto, activation, True)
    assert inner.shape == (T * B * K, 2 * H)
    kept = cpu.backward(dy, x, w_in, w_out, gates, bias, inner, order, offsets, activation)
    again = cpu.backward(dy, x, w_in, w_out, gates, bias, inner[:0], order, offsets, activation)
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_the_inner_layer_is_kept_only_where_a_gradient_may_be_asked_for() -> None:
    found = torch.ops.recsys.routed_experts(*drawn(), True), torch.ops.recsys.routed_experts(*drawn(), False)
    assert [inner.shape[0] for _, inner, _, _ in found] == [T * B * K, 0]
    assert torch.equal(found[0][0], found[1][0])


def test_pairs_are_sorted_by_token_and_expert_and_rows_keep_their_order() -> None:
    chosen = torch.tensor([[[1, 0], [0, -1], [1, 2]], [[2, 1], [-1, -1], [2, 0]]])
    order, offsets = cpu.sort_pairs(chosen, 3)
    keys = [(t, e, 2 * (3 * t + b) + j) for t in range(2) for b in range(3) for j in range(2) if (e := int(chosen[t, b, j])) >= 0]
    assert order[: len(keys)].tolist() == [place for _, _, place in sorted(keys)]
    assert order[len(keys) :].tolist() == [3, 8, 9]
    assert offsets.tolist() == [0, 2, 4, 5, 6, 7, 9]


def test_operations_are_those_of_the_choices_that_were_made() -> None:
    given = drawn()
    with FlopCounterMode(display=False) as counter:
        value = routed_experts(*given)
        assert counter.get_total_flops() == pairs_of((T, B, D, H, E, K, 0)) * 2 * D * 3 * H
        value.sum().backward()
    assert counter.get_total_flops() == 3 * pairs_of((T, B, D, H, E, K, 0)) * 2 * D * 3 * H


@pytest.mark.parametrize("left_out", [(), (5,), (6,), (5, 6)])
def test_the_op_keeps_the_promises_of_torch_library(left_out: tuple[int, ...]) -> None:
    given = [None if place in left_out else one for place, one in enumerate(drawn())]
    found = torch.library.opcheck(torch.ops.recsys.routed_experts.default, (*given, True))
    assert set(found.values()) == {"SUCCESS"}


def test_autocast_casts_everything_and_gives_each_its_gradient() -> None:
    given = drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = routed_experts(*given[:6], given[6].bfloat16(), given[7])  # as a product under autocast would be
    assert value.dtype == torch.bfloat16
    torch.testing.assert_close(value.float(), routed_experts(*given), rtol=3e-2, atol=3e-2)
    value.sum().backward()
    assert all(
        one.grad.dtype == torch.float32 and one.grad.abs().max() > 0 for one in given if isinstance(one, Tensor) and one.requires_grad
    )


def test_the_sum_over_experts_is_not_rounded_on_its_way() -> None:
    """In bfloat16 256 + 2/3 is 256, and so is the next; with three of them the sum is 258."""
    x, w_in, w_out = torch.ones(1, 1, 1), torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    act = functional.gelu(torch.ones(1)).item()
    onto, gates = torch.full((1, 1, 1), 256.0), torch.full((1, 1, 3), 2 / 3 / act)
    given = (x, w_in, w_out, torch.tensor([[[0, 1, 2]]]), gates, None, onto)
    half = [one.bfloat16() if isinstance(one, Tensor) and one.is_floating_point() else one for one in given]
    assert routed_experts(*half, "gelu").item() == 258


# Int8 weights


@pytest.mark.parametrize("gelu", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "of_output", "of_weight"), [(torch.int8, (7e-3, 1.4e-2), (5e-3, 8e-3)), (FLOAT8, (3.2e-2, 4.7e-2), (2.4e-2, 2.7e-2))]
)
def test_quantized_weights_are_within_their_error_of_the_floats(
    dtype: torch.dtype, of_output: tuple[float, float], of_weight: tuple[float, float], gelu: int
) -> None:
    """What `quantize_experts` states, for normal weights at two widths."""
    for shape in ((2, 100, 64, 16, 7, 3, gelu), (2, 20, 512, 64, 3, 2, gelu)):
        x, w_in, w_out, chosen, gates, _, _, activation = (
            one.detach() if isinstance(one, Tensor) else one for one in draw(shape, torch.float32, torch.Generator().manual_seed(0))
        )
        (q_in, scale_in), (q_out, scale_out) = (quantize_experts(one, dtype) for one in (w_in, w_out))
        found = routed_experts_quantized(x, q_in, q_out, chosen, gates, scale_in, scale_out, None, None, activation)
        expected = routed_experts(x, w_in, w_out, chosen, gates, None, None, activation)
        assert of_output[0] < (found - expected).norm() / expected.norm() < of_output[1]
        assert of_weight[0] < (q_in.float() * scale_in[:, :, None] - w_in).norm() / w_in.norm() < of_weight[1]


def test_quantised_weights_are_within_half_a_scale_and_reach_the_largest_number() -> None:
    weight = torch.randn(2, 3, 20, 6, generator=torch.Generator().manual_seed(0))
    weight[0, 1, :, 2] = 0
    q, scale = quantize_experts(weight)
    assert q.dtype == torch.int8
    assert scale.shape == (2, 3, 6)
    assert ((q * scale[:, :, None] - weight).abs() <= 0.5001 * scale[:, :, None]).all()
    largest = q.abs().amax(2)
    assert largest[0, 1, 2] == 0 == scale[0, 1, 2]
    largest[0, 1, 2] = 127
    assert torch.equal(largest, torch.full_like(largest, 127))
    back, same = quantize_experts(q * scale[:, :, None])
    assert torch.equal(back, q)
    torch.testing.assert_close(same, scale)


def test_float8_keeps_the_small_weights_of_a_column_with_large_ones() -> None:
    """Which is when to take it: with one weight in a hundred thirty times as large, those of common size lose less than with int8."""
    weight = torch.randn(1000, 20, generator=torch.Generator().manual_seed(0))
    weight[::100] *= 30
    common = torch.arange(1000) % 100 != 0
    lost = {}
    for dtype in (torch.int8, FLOAT8):
        q, scale = quantize_experts(weight, dtype)
        lost[dtype] = float((q.float() * scale - weight)[common].norm() / weight[common].norm())
    assert lost[FLOAT8] < 0.3 * lost[torch.int8]
    assert lost[FLOAT8] < 2.8e-2


def test_float8_weights_are_within_a_sixteenth_and_what_float8_holds_comes_back() -> None:
    weight = torch.randn(2, 3, 20, 6, generator=torch.Generator().manual_seed(0))
    weight[0, 1, :, 2] = 0
    q, scale = quantize_experts(weight, FLOAT8)
    error = (q.float() * scale[:, :, None] - weight).abs()
    assert (error <= (weight.abs() / 16).maximum(2.0**-10 * scale[:, :, None]) * 1.0001).all()
    assert torch.equal(q.float().abs().amax(2) == 448, scale > 0)
    back, same = quantize_experts(q.float() * scale[:, :, None], FLOAT8)
    assert torch.equal(back.float(), q.float())
    torch.testing.assert_close(same, scale)


@pytest.mark.parametrize("fp8", [0, 1])
@pytest.mark.parametrize("chosen", ["cpu", "reference"])
def test_quantized_weights_are_floats_that_were_scaled(chosen: Any, fp8: int) -> None:
    given = QUANTIZED.inputs((T, B, D, H, E, K, 0, fp8), torch.float64, torch.Generator().manual_seed(0))
    x, q_in, q_out, choice, gates, scale_in, scale_out, bias, onto, activation = given
    expected = by_hand(
        x,
        q_in.double() * scale_in[:, :, None].double(),
        q_out.double() * scale_out[:, :, None].double(),
        choice,
        gates,
        bias,
        onto,
        activation,
    )
    with backend.use(chosen):
        torch.testing.assert_close(routed_experts_quantized(*given), expected)


def test_torch_library_accepts_float8() -> None:
    """But for the schema's own test, which multiplies its inputs, and no float8 can be multiplied."""
    given = QUANTIZED.inputs((T, B, D, H, E, K, 0, 1), torch.float32, torch.Generator().manual_seed(0))
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    assert set(torch.library.opcheck(torch.ops.recsys.routed_experts_quantized.default, given, test_utils=tests).values()) == {"SUCCESS"}


def test_operations_with_quantized_weights_are_counted() -> None:
    shape = (T, B, D, H, E, K, 1, 0)
    given = QUANTIZED.inputs(shape, torch.float32, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        routed_experts_quantized(*given)
    assert counter.get_total_flops() == QUANTIZED.work(shape, torch.float32).flops == pairs_of(shape[:-1]) * 2 * D * 2 * H


# The loops in C++


def on_threads(threads: int, given: tuple[Any, ...]) -> tuple[Tensor, ...]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with backend.use("native"):
            values, found = forward_backward(OP.call, given)
    finally:
        torch.set_num_threads(before)
    return *values, *found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 700, 20, 12, 3, 2), (5, 40, 32, 16, 4, 3)])
@pytest.mark.parametrize("gelu", [0, 1])
def test_threads_change_no_bit(shape: tuple[int, ...], gelu: int, dtype: torch.dtype) -> None:
    one, *others = (on_threads(threads, drawn(dtype, gelu, shape)) for threads in (1, 2, 3))
    for other in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(other, one, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gelu", [0, 1])
def test_a_row_alone_gets_the_same_bits(gelu: int, dtype: torch.dtype) -> None:
    x, w_in, w_out, chosen, gates, bias, onto, activation = drawn(dtype, gelu, (2, 90, 20, 12, 3, 2))
    with backend.use("native"):
        together = routed_experts(x, w_in, w_out, chosen, gates, bias, onto, activation)
        (dx,) = torch.autograd.grad(together.sum(), x)
        for row in (0, 7, 8, 89):
            own = slice(row, row + 1)
            alone = routed_experts(x[:, own], w_in, w_out, chosen[:, own], gates[:, own], bias, onto[:, own], activation)
            assert torch.equal(alone, together[:, own])
            assert torch.equal(torch.autograd.grad(alone.sum(), x)[0][:, own], dx[:, own])


@pytest.mark.parametrize("left_out", [(), (5,), (6,), (5, 6)])
@pytest.mark.parametrize("gelu", [0, 1])
def test_loops_keep_what_torch_operations_keep(gelu: int, left_out: tuple[int, ...]) -> None:
    """So that either may run backward after either."""
    *given, activation = (one.detach() if isinstance(one, Tensor) else one for one in drawn(torch.float32, gelu))
    given = [None if place in left_out else one for place, one in enumerate(given)]
    x, w_in, w_out, _, gates, bias, _ = given
    found, expected = (module.forward(*given, activation, True) for module in (native, cpu))
    for mine, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(found[2], expected[2])
    assert torch.equal(found[3], expected[3])
    dy = torch.randn(T, B, D, generator=torch.Generator().manual_seed(1))
    kept = native.backward(dy, x, w_in, w_out, gates, bias, *found[1:], activation)
    again = native.backward(dy, x, w_in, w_out, gates, bias, found[1][:0], *found[2:], activation)
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    for mine, theirs in zip(kept, cpu.backward(dy, x, w_in, w_out, gates, bias, *found[1:], activation), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("tokens", "batch", "experts", "choices"), [(0, B, E, K), (T, 0, E, K), (T, B, E, 0), (T, B, 1, 1), (1, 1, 1, 1), (1, 1, E, K)]
)
@pytest.mark.parametrize("idle", [False, True])
def test_loops_run_where_there_is_little_or_nothing(tokens: int, batch: int, experts: int, choices: int, idle: bool) -> None:
    x, w_in, w_out, chosen, gates, bias, onto, activation = drawn(torch.float32, shape=(T, B, D, H, experts, min(K, experts)))
    if idle:
        chosen[:] = -1
    x, onto, chosen, gates = (one[:tokens, :batch] for one in (x, onto, chosen[..., :choices], gates[..., :choices]))
    given = (x, w_in[:tokens], w_out[:tokens], chosen, gates, bias[:tokens], onto, activation)
    with backend.use("native"), backend.record() as ran:
        value = routed_experts(*given)
        found = gradients(value, given)
    assert {choice.backend for choice in ran} == {"native"}
    expected = OP.reference(*given)
    for mine, theirs in zip((value, *found), (expected, *gradients(expected, given)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_loops_take_tokens_and_rows_in_either_order_and_weights_in_any() -> None:
    x, w_in, w_out, chosen, gates, bias, onto, activation = drawn(torch.float32)
    with backend.use("native"):
        expected = routed_experts(x, w_in, w_out, chosen, gates, bias, onto, activation)
        expected_gradients = gradients(expected, (x, w_in, w_out))
        turned = [one.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for one in (x, onto)]
        weights = [one.detach().mT.contiguous().mT.requires_grad_() for one in (w_in, w_out)]
        value = routed_experts(turned[0], *weights, chosen, gates, bias, turned[1], activation)
        assert torch.equal(value, expected)
        for mine, theirs in zip(gradients(value, (turned[0], *weights)), expected_gradients, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("gelu", [0, 1])
@pytest.mark.parametrize("fp8", [0, 1])
def test_loops_with_quantized_weights_equal_their_reference(fp8: int, gelu: int) -> None:
    given = QUANTIZED.inputs((2, 100, 20, 33, 5, 3, gelu, fp8), torch.float32, torch.Generator().manual_seed(0))
    wide = [one.double() if isinstance(one, Tensor) and one.dtype == torch.float32 else one for one in given]
    with backend.use("native"), backend.record() as ran:
        torch.testing.assert_close(routed_experts_quantized(*given).double(), QUANTIZED.reference(*wide), rtol=1e-5, atol=1e-5)
    assert {choice.backend for choice in ran} == {"native"}


@pytest.mark.parametrize(("dim", "expected"), [(256, "native"), (257, "cpu")])
def test_experts_too_large_for_the_cache_are_left_to_torch(dim: int, expected: str) -> None:
    given = drawn(torch.float32, shape=(1, 2, dim, 128, 1, 1))
    with backend.use("native"), backend.record() as ran:
        value = routed_experts(*given)
        value.sum().backward()
    assert {choice.backend for choice in ran} == {expected}
    torch.testing.assert_close(value, OP.reference(*given), rtol=1e-5, atol=1e-5)


def test_loops_name_a_choice_that_is_no_expert() -> None:
    given = list(drawn(torch.float32))
    narrow = list(QUANTIZED.inputs((T, B, D, H, E, K, 0, 0), torch.float32, torch.Generator().manual_seed(0)))
    given[3] = narrow[3] = given[3].clone()
    given[3][1, 2, 1] = E + 1
    for call, arguments in ((routed_experts, given), (routed_experts_quantized, narrow)):
        with backend.use("native"), pytest.raises(ValueError, match="chosen: expected experts below 4, got 5"):
            call(*arguments)


# Errors


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.ones(T, B), r"x: expected \[T, B, D\], got \(3, 9\)"),
        (1, torch.ones(T, E, D, H), r"weight_in: expected shape \(3, 4, 8, 10\), got \(3, 4, 8, 5\)"),
        (1, torch.ones(T, E, D, 2 * H, dtype=torch.float64), r"weight_in: expected torch.float32, got torch.float64"),
        (2, torch.ones(T, H, D), r"weight_out: expected \[T, E, h, D\], got \(3, 5, 8\)"),
        (3, torch.ones(T, B + 1, K, dtype=torch.int64), r"chosen: expected shape \(3, 9, 2\), got \(3, 10, 2\)"),
        (3, torch.ones(T, B, K, dtype=torch.int32), "chosen: expected torch.int64, got torch.int32"),
        (3, torch.full((T, B, K), E), "chosen: expected experts below 4, got 4"),
        (4, torch.ones(T, B, 1), r"gates: expected shape \(3, 9, 2\), got \(3, 9, 1\)"),
        (5, torch.ones(T, E, H), r"bias: expected shape \(3, 4, 10\), got \(3, 4, 5\)"),
        (6, torch.ones(T, B, D).half(), "onto: expected torch.float32, got torch.float16"),
        (7, "relu", "activation: expected one of swiglu, gelu, got 'relu'"),
    ],
)
def test_an_input_that_does_not_fit_is_an_error_that_names_it(place: int, wrong: Any, message: str) -> None:
    given = list(drawn(torch.float32))
    given[place] = wrong
    with pytest.raises(ValueError, match=message):
        routed_experts(*given)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (1, torch.ones(T, E, D, 2 * H), "weight_in: expected torch.int8 or torch.float8_e4m3fn, got torch.float32"),
        (5, torch.ones(T, E, D), r"scale_in: expected shape \(3, 4, 10\), got \(3, 4, 8\)"),
        (6, torch.ones(T, E, D).half(), "scale_out: expected torch.float32, got torch.float16"),
    ],
)
def test_a_quantized_input_that_does_not_fit_is_an_error_that_names_it(place: int, wrong: Tensor, message: str) -> None:
    given = list(QUANTIZED.inputs((T, B, D, H, E, K, 0, 0), torch.float32, torch.Generator().manual_seed(0)))
    given[place] = wrong
    with pytest.raises(ValueError, match=message):
        routed_experts_quantized(*given)
    with pytest.raises(ValueError, match=r"weight: expected \[..., K, N\] of a floating dtype, got torch.int8"):
        quantize_experts(torch.ones(2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"dtype: expected torch.int8 or torch.float8_e4m3fn, got torch.float16"):
        quantize_experts(torch.ones(2, 2), torch.float16)
    with pytest.raises(ValueError, match="weight: expected finite numbers, got 1 others"):
        quantize_experts(torch.tensor([[1.0, torch.inf]]))
