# SPDX-License-Identifier: Apache-2.0
"""Attention to chosen keys against PyTorch's masked dense attention, and what it must not depend on."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from kernels import backend
from kernels.op import forward_backward
from kernels.selected_attention import OP, cpu, gathered_elements, native, reference, selected_attention
from kernels.selected_attention.shape import Case, Layout
from kernels.testing import error_ratio

CASE = Case(2, 4, 2, 7, 20, 2, 3, 9, 5, 3, 1)


def drawn(case: Case = CASE, dtype: torch.dtype = torch.float64) -> tuple:
    return OP.inputs(case, dtype, torch.Generator().manual_seed(0))


def dense(q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, last: Tensor | None, scale: float) -> Tensor:
    """All keys, and a mask that says which of them a query reads: no gather, no fold."""
    heads, length, keys = q.shape[1], q.shape[2], k.shape[2]
    chosen = (index[..., None] == torch.arange(keys)) & valid[..., None]
    mask = chosen.any(3).repeat_interleave(heads // index.shape[1], 1)
    mask = mask.repeat_interleave(-(-length // index.shape[2]), 2)[:, :, :length]
    if last is not None:
        mask = mask & (torch.arange(keys) <= last[:, None])
    some = mask.any(-1, keepdim=True)
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~some, scale=scale, enable_gqa=True)
    return torch.where(some, y, 0.0)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("queries", "blocks"), [(7, 1), (7, 3), (7, 7), (1, 1)])
@pytest.mark.parametrize("causal", [0, 1])
def test_is_masked_dense_attention_with_its_gradients(groups: int, queries: int, blocks: int, causal: int) -> None:
    given = drawn(Case(2, 4, 2, queries, 20, groups, blocks, 9, 5, 3, causal))
    found, expected = selected_attention(*given), dense(*given)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    for mine, theirs in zip(*(torch.autograd.grad(y, given[:3], upstream) for y in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("elements", [1, 500, 1 << 20])
def test_how_much_is_gathered_at_a_time_changes_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = drawn()
    whole = selected_attention(*given)
    expected = torch.autograd.grad(whole.square().sum(), given[:3])
    monkeypatch.setattr(cpu, "_ELEMENTS", elements)
    found = selected_attention(*given)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), given[:3]), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("own", [False, True])
def test_folding_is_undone(own: bool) -> None:
    layout = Layout(2, 6, 3, 7, 3, 6 if own else 1)
    x = torch.randn(2, 6, 7, 4)
    folded = layout.fold(x)
    assert layout.own == own and folded.shape == (2 * layout.units, 3, layout.rows, 4)
    assert torch.equal(layout.unfold(folded), x)


def test_a_key_that_is_listed_twice_counts_twice() -> None:
    q, k, v, *_ = (x.detach() for x in drawn()[:3])
    index = torch.tensor([4, 4, 7]).expand(2, 1, 1, 3)
    scores = (q @ k[:, :, [4, 7]].repeat_interleave(2, 1).mT) + torch.tensor([2.0, 1.0]).double().log()
    expected = scores.softmax(-1) @ v[:, :, [4, 7]].repeat_interleave(2, 1)
    torch.testing.assert_close(selected_attention(q, k, v, index, torch.ones_like(index, dtype=torch.bool), scale=1.0), expected)


def test_a_query_that_reads_nothing_gives_zeros_and_takes_no_gradient() -> None:
    q, k, v, index, valid, _, scale = drawn()
    valid = torch.zeros_like(valid)
    y = selected_attention(q, k, v, index, valid, None, scale)
    assert torch.equal(y, torch.zeros_like(y))
    for gradient in torch.autograd.grad(y.sum() + selected_attention(q, k, v, index, valid).sum(), (q, k, v)):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    empty = selected_attention(q, k[:, :, :0], v[:, :, :0], index, valid)
    assert torch.equal(empty, torch.zeros_like(y))


def test_what_does_not_count_may_be_any_number() -> None:
    q, k, v, index, valid, last, scale = drawn()
    changed = index.masked_fill(~valid, -7)
    assert torch.equal(selected_attention(q, k, v, changed, valid, last, scale), selected_attention(q, k, v, index, valid, last, scale))


def test_keys_that_lie_in_other_orders_give_the_same_and_are_not_copied() -> None:
    q, k, v, *rest = (x.detach() if isinstance(x, Tensor) else x for x in drawn())
    expected = selected_attention(q, k, v, *rest)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    assert torch.equal(selected_attention(q, *turned, *rest), expected)
    assert all(cpu._table(x).values.data_ptr() == x.data_ptr() for x in turned)
    wide = [torch.cat((x, x), 3)[..., : x.shape[3]] for x in (k, v)]
    odd = [torch.cat((x, x[..., :1]), 3)[..., : x.shape[3]] for x in (k, v)]
    assert torch.equal(selected_attention(q, *wide, *rest), expected) and torch.equal(selected_attention(q, *odd, *rest), expected)
    one = [x[:1].expand(2, -1, -1, -1) for x in (k, v)]
    assert torch.equal(selected_attention(q, *one, *rest), selected_attention(q, *(x.contiguous() for x in one), *rest))


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    q, k, v, index, valid, last, scale = drawn(Case(3, 4, 2, 7, 20, 2, 3, 9, 8, 8, 1), torch.float32)
    whole = selected_attention(q, k, v, index, valid, last, scale)
    for b in range(3):
        row = slice(b, b + 1)
        alone = selected_attention(q[row], k[row], v[row], index[row], valid[row], last, scale)
        torch.testing.assert_close(alone, whole[row], rtol=0, atol=1e-6)


ODD = [
    Case(2, 6, 2, 131, 77, 2, 4, 50, 33, 20, 1),  # chunks of queries that are not full, and columns that fill no vector
    Case(2, 6, 2, 131, 77, 6, 1, 50, 16, 48, 0),
    Case(1, 4, 2, 2, 700, 2, 1, 600, 17, 5, 1),  # a list in parts
    Case(1, 4, 1, 1, 12_000, 4, 1, 10_000, 8, 8, 0),
    Case(1, 2, 1, 70, 12_000, 1, 1, 10_000, 4, 4, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ODD, ids=lambda case: "x".join(map(str, case)))
def test_the_loop_equals_the_reference_in_double_precision(case: Case, dtype: torch.dtype) -> None:
    given = drawn(case, dtype)
    wide = [x.detach().double().requires_grad_() for x in given[:3]]
    expected = reference.selected_attention(*wide, *given[3:])
    upstream = torch.randn(expected.transpose(1, 2).shape, generator=torch.Generator().manual_seed(1)).to(dtype).transpose(1, 2)
    with backend.use("native"), backend.record() as ran:
        found = selected_attention(*given)
        gradients = torch.autograd.grad(found, given[:3], upstream)
    assert {choice.backend for choice in ran} == {"native"}
    pairs = zip((found.detach(), *gradients), (expected, *torch.autograd.grad(expected, wide, upstream.double())), strict=True)
    assert all(error_ratio(mine, theirs.detach()) < (4e-6 if dtype == torch.float32 else 1e-2) for mine, theirs in pairs)


@pytest.mark.parametrize("case", [Case(3, 6, 2, 131, 77, 2, 4, 50, 33, 20, 1), Case(3, 4, 2, 1, 700, 2, 1, 600, 16, 16, 0)])
def test_the_loop_gives_the_same_bits_on_any_number_of_threads_and_for_any_batch_mates(case: Case) -> None:
    given = drawn(case, torch.float32)
    row = [x[1:2].detach().requires_grad_(x.requires_grad) for x in given[:5]]
    before, found = torch.get_num_threads(), []
    try:
        with backend.use("native"):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                values, gradients = forward_backward(selected_attention, given)
                found.append((*values, *gradients))
            values, gradients = forward_backward(selected_attention, (*row, *given[5:]))
    finally:
        torch.set_num_threads(before)
    for one, two, three, alone in zip(*found, (*values, *gradients), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three) and torch.equal(one[1:2], alone)


@pytest.mark.parametrize("case", [CASE, Case(2, 4, 2, 1, 700, 2, 1, 600, 5, 3, 0)])
def test_what_the_loop_keeps_means_what_torch_operations_keep(case: Case) -> None:
    given = [x.detach() if isinstance(x, Tensor) else x for x in drawn(case, torch.float32)]
    (y, lse), (y_cpu, lse_cpu) = native.forward(*given), cpu.forward(*given)
    torch.testing.assert_close(y, y_cpu)
    torch.testing.assert_close(lse, lse_cpu)
    assert bool((lse == torch.inf).any()) == (case is CASE)
    for mine, theirs in zip(
        native.backward(y, *given[:6], y_cpu, lse_cpu, given[6]), cpu.backward(y, *given[:6], y, lse, given[6]), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_loop_reads_tensors_as_they_lie_and_nothing_where_nothing_counts() -> None:
    q, k, v, index, valid, last, scale = (x.detach() if isinstance(x, Tensor) else x for x in drawn(dtype=torch.float32))
    with backend.use("native"):
        expected = selected_attention(q, k, v, index, valid, last, scale)
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        apart = [torch.stack((x, x), -1)[..., 0] for x in (q, k, v)]
        for others in (turned, apart):
            assert torch.equal(selected_attention(*others, index.long().masked_fill(~valid, -7), valid, last.int(), scale), expected)
        whole = selected_attention(q, k, v, index, valid, torch.full_like(last, 1 << 40), scale)
        assert torch.equal(whole, selected_attention(q, k, v, index, valid, None, scale))
        nothing = torch.zeros_like(valid)
        for keys in (20, 0):
            leaves = [x.clone().requires_grad_() for x in (q, k[:, :, :keys], v[:, :, :keys])]
            (y,), gradients = forward_backward(selected_attention, (*leaves, index, nothing, last, scale))
            assert not y.any() and not any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("place", [-1, 20, 1 << 32])
def test_a_place_that_no_key_has_is_an_error_of_the_loop_too(place: int) -> None:
    q, k, v, index, valid, last, scale = (x.detach() if isinstance(x, Tensor) else x for x in drawn(dtype=torch.float32))
    y, lse = native.forward(q, k, v, index, valid, last, scale)
    index, valid = index.long(), torch.ones_like(valid)
    index[1, 0, 2, 3] = place
    with pytest.raises(RuntimeError, match="index: expected places from 0 to 19 where valid"):
        native.forward(q, k, v, index, valid, last, scale)
    with pytest.raises(RuntimeError, match="index: expected places from 0 to 19 where valid"):
        native.backward(y, q, k, v, index, valid, last, y, lse, scale)


def test_the_loop_takes_single_precision_and_bfloat16() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    assert [native.supports(*(drawn(dtype=dtype)[i] for i in (0, 2))) for dtype in dtypes] == [True, True, False, False]
    given = drawn(dtype=torch.float16)
    with backend.use("native"), backend.record() as ran:
        y = selected_attention(*given)
        torch.autograd.grad(y.sum(), given[:3])
    assert {choice.backend for choice in ran} == {"cpu"}
    with backend.use("cpu"):
        assert torch.equal(y, selected_attention(*given))


def test_autocast_takes_its_dtype_and_statistics_stay_in_single_precision() -> None:
    given = [x.detach() if isinstance(x, Tensor) else x for x in drawn(dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        found = selected_attention(*given)
    low = [x.bfloat16() for x in given[:3]]
    assert found.dtype == torch.bfloat16 and torch.equal(found, selected_attention(*low, *given[3:]))
    dy = torch.randn_like(low[0][..., :3])
    y, lse = cpu.forward(*low, *given[3:])
    alone = torch.ops.recsys.selected_attention_backward(dy, *low, *given[3:6], y, lse, given[6])
    with torch.autocast("cpu", torch.bfloat16):
        within = torch.ops.recsys.selected_attention_backward(dy, *low, *given[3:6], y, lse, given[6])
    assert all(torch.equal(one, other) for one, other in zip(alone, within, strict=True))


def test_other_devices_form_the_weights_and_get_the_same() -> None:
    """`cpu` without the fused operation, as where Triton does not take the dtype."""

    class Elsewhere(Tensor):
        device = torch.device("meta")

    q, k, v = (torch.randn(3, 2, rows, 4, dtype=torch.float64) for rows in (5, 6, 6))
    seen = torch.rand(3, 1, 5, 6) < 0.6
    seen[0, 0, 0] = False
    dy = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    y, lse = cpu._attend(q, k, v, seen, 0.3)
    there = q.as_subclass(Elsewhere)
    y_there, lse_there = cpu._attend(there, k, v, seen, 0.3)
    torch.testing.assert_close(y_there.as_subclass(Tensor), y)
    torch.testing.assert_close(lse_there.as_subclass(Tensor), lse)
    expected = cpu._attend_backward(dy, y, lse, q, k, v, seen, 0.3)
    found = cpu._attend_backward(dy, y, lse, there, k, v, seen, 0.3)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.as_subclass(Tensor), theirs)


def test_operations_and_gathered_rows_are_counted() -> None:
    q, k, v, index, valid, last, scale = drawn()
    with FlopCounterMode(display=False) as forward:
        y = selected_attention(q, k, v, index, valid, last, scale)
    with FlopCounterMode(display=False) as both:
        y.sum().backward()
    pairs = 2 * 4 * 9 * 9  # three blocks of three queries, of which the last one lacks two
    assert forward.get_total_flops() == 2 * pairs * (5 + 3)
    assert both.get_total_flops() == 2 * pairs * (3 * 5 + 2 * 3)
    assert gathered_elements(q.shape, k.shape, v.shape, index.shape) == 2 * 2 * 3 * 9 * (5 + 3)


def test_the_reference_can_be_chosen_without_a_key() -> None:
    q, k, v, index, valid, *_ = drawn()
    with backend.use("reference"):
        assert bool((selected_attention(q, k[:, :, :0], v[:, :, :0], index, torch.zeros_like(valid)) == 0).all())


@pytest.mark.parametrize("place", [-1, 20])
def test_a_place_that_no_key_has_is_an_error_on_the_cpu(place: int) -> None:
    q, k, v, index, valid, last, scale = drawn()
    index, valid = index.clone(), torch.ones_like(valid)
    index[1, 0, 2, 3] = place
    with pytest.raises(RuntimeError, match="index: expected places from 0 to 19 where valid"):
        selected_attention(q, k, v, index, valid, last, scale)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.ones(2, 4, 7), r"q: expected \[B, H, T, e\]"),
        (1, torch.ones(2, 3, 20, 5), r"k: expected torch.float64 of shape \[2, a divisor of 4, N, 5\], got .* \(2, 3, 20, 5\)"),
        (1, torch.ones(2, 2, 20, 5), "k: expected torch.float64"),
        (2, torch.ones(2, 2, 19, 3).double(), r"v: expected torch.float64 of shape \[2, 2, 20, e_v\], got .* \(2, 2, 19, 3\)"),
        (3, torch.zeros(2, 3, 3, 9, dtype=torch.int32), r"index: expected int32 or int64 of shape \[2, 1, 2 or 4, Q, K\]"),
        (3, torch.zeros(2, 2, 3, 9), "index: expected int32 or int64"),
        (3, torch.zeros(2, 2, 5, 9, dtype=torch.int32), "index: expected blocks of equal size for 7 queries, but the last, got 5 blocks"),
        (3, torch.zeros(2, 2, 8, 9, dtype=torch.int32), "got 8 blocks"),
        (4, torch.ones(2, 2, 3, 8, dtype=torch.bool), r"valid: expected bool of shape \(2, 2, 3, 9\)"),
        (5, torch.arange(6), r"last: expected int32 or int64 of shape \(7,\), got torch.int64 of shape \(6,\)"),
    ],
)  # fmt: skip
def test_an_input_that_does_not_fit_is_an_error_that_names_it(place: int, wrong: Tensor, message: str) -> None:
    given = list(drawn())
    given[place] = wrong
    with pytest.raises(ValueError, match=message):
        selected_attention(*given)
