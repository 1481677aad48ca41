# SPDX-License-Identifier: Apache-2.0
"""Paged scores against a loop over heads and rows, and errors."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels import backend
from kernels.paged_scores import DTYPES, OP, cpu, native, paged_scores
from kernels.testing import error_ratio

SHAPE = (6, 3, 5, 63, 40, 0, 7)


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return OP.inputs(SHAPE, dtype, torch.Generator().manual_seed(0))[:4]


@pytest.mark.parametrize("slot_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("elements", [1, 100, 1 << 18])
def test_is_gather_then_product(slot_type: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_ELEMENTS", elements)
    q, pages, slots, offsets = drawn()
    found = paged_scores(q, pages, slots.to(slot_type), offsets.to(slot_type), torch.float64)
    for row in range(3):
        begin, end = int(offsets[row]), int(offsets[row + 1])
        for head in range(6):
            torch.testing.assert_close(found[head, begin:end], pages[slots[begin:end], head // 2] @ q[row, head])


@pytest.mark.parametrize("version", ["reference", "cpu", "native"])
def test_a_slot_of_minus_one_scores_minus_infinity(version: str) -> None:
    q, pages, slots, offsets = drawn(torch.float32)
    whole, slots = paged_scores(q, pages, slots, offsets), slots.clone()
    slots[[0, 41]] = -1
    with backend.use(version):
        found = paged_scores(q, pages, slots, offsets)
    assert bool((found[:, [0, 41]] == -torch.inf).all())
    torch.testing.assert_close(found[:, 1:41], whole[:, 1:41])
    nothing = paged_scores(q, pages[:0], torch.full_like(slots, -1), offsets)
    assert bool((nothing == -torch.inf).all())


def test_scores_of_half_precision_are_single_unless_asked_otherwise() -> None:
    q, pages, slots, offsets = drawn(torch.bfloat16)
    found = paged_scores(q, pages, slots, offsets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, paged_scores(q.float(), pages.float(), slots, offsets), rtol=1e-6, atol=1e-6)
    assert paged_scores(q, pages, slots, offsets, torch.bfloat16).dtype == torch.bfloat16


def test_a_pool_that_is_a_view_gives_the_same() -> None:
    q, pages, slots, offsets = drawn()
    turned = pages.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    torch.testing.assert_close(paged_scores(q, turned, slots, offsets), paged_scores(q, pages, slots, offsets))


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    q, pages, slots, offsets = drawn(torch.float32)
    alone = paged_scores(q[2:], pages, slots[40:], torch.tensor([0, 7]))
    assert torch.equal(alone, paged_scores(q, pages, slots, offsets)[:, 40:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slot_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("width", [1, 15, 16, 33, 128])
def test_the_loop_equals_the_reference_in_double_precision(dtype: torch.dtype, slot_type: torch.dtype, width: int) -> None:
    """Also over a pool that is a view, rows that are shorter and longer than a task, and slots of -1."""
    q, pages, slots, offsets, _ = OP.inputs((6, 2, width, 900, 700, 0, 1, 17, 300), dtype, torch.Generator().manual_seed(1))
    slots[::7] = -1
    expected = OP.reference(q.double(), pages.double(), slots, offsets, torch.float64)
    turned = pages.transpose(0, 1).contiguous().transpose(0, 1)
    apart = torch.stack((pages, pages), -1)[..., 0]
    with backend.use("native"), backend.record() as ran:
        found = paged_scores(q, pages, slots.to(slot_type), offsets)
        assert all(torch.equal(found, paged_scores(q, other, slots.to(slot_type), offsets)) for other in (turned, apart))
    assert {choice.backend for choice in ran} == {"native"}
    missing = slots < 0
    assert bool((found[:, missing] == -torch.inf).all())
    assert error_ratio(found[:, ~missing], expected[:, ~missing]) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_the_loop_gives_the_same_bits_on_any_number_of_threads_and_for_any_batch_mates() -> None:
    q, pages, slots, offsets, _ = OP.inputs((4, 4, 64, 5000, 1000, 3, 4096), torch.float32, torch.Generator().manual_seed(1))
    before, found = torch.get_num_threads(), []
    try:
        with backend.use("native"):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(paged_scores(q, pages, slots, offsets))
            alone = paged_scores(q[2:], pages, slots[1003:], torch.tensor([0, 4096]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0][:, 1003:], alone)


def test_the_loop_takes_single_precision_and_bfloat16() -> None:
    supported = {dtype for dtype in DTYPES if native.supports(drawn(dtype)[0], torch.float32)}
    assert supported == {torch.float32, torch.bfloat16}
    q, pages, slots, offsets = drawn(torch.float16)
    with backend.use("native"), backend.record() as ran:
        found = paged_scores(q, pages, slots, offsets)
    assert {choice.backend for choice in ran} == {"cpu"}
    with backend.use("cpu"):
        assert torch.equal(found, paged_scores(q, pages, slots, offsets))


def test_no_gradient_passes_and_products_are_counted() -> None:
    q, pages, slots, offsets = drawn()
    with FlopCounterMode(display=False) as counter:
        found = paged_scores(q.requires_grad_(), pages.requires_grad_(), slots, offsets)
    assert not found.requires_grad
    assert counter.get_total_flops() == 2 * 6 * 47 * 5


def test_no_rows_are_no_error() -> None:
    q, pages, slots, _ = drawn()
    assert paged_scores(q[:0], pages, slots[:0], torch.tensor([0])).shape == (6, 0)


@pytest.mark.parametrize("version", ["reference", "cpu", "native"])
@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (2, torch.full((47,), 63), "slots: expected -1 to 62, got 63 to 63"),
        (2, torch.full((47,), -2), "slots: expected -1 to 62, got -2 to -2"),
        (3, torch.tensor([0, 40, 40, 46]), "offsets: expected not descending ones from 0 to 47"),
        (3, torch.tensor([0, 40, 39, 47]), "offsets: expected not descending ones from 0 to 47"),
    ],
)
def test_values_that_do_not_fit_are_errors_on_the_cpu(version: str, place: int, wrong: Tensor, message: str) -> None:
    given = list(drawn(torch.float32))
    given[place] = wrong
    with backend.use(version), pytest.raises(RuntimeError, match=message):
        paged_scores(*given)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.ones(3, 6), r"q: expected \[B, H, e\]"),
        (1, torch.ones(63, 4, 5).double(), r"pages: expected torch.float64 of shape \[P, a divisor of 6, 5\], got .* \(63, 4, 5\)"),
        (1, torch.ones(63, 3, 5), "pages: expected torch.float64"),
        (2, torch.ones(47), r"slots: expected int32 or int64 of shape \[S\], got torch.float32"),
        (3, torch.tensor([0, 40, 47]), r"offsets: expected int32 or int64 of shape \[4\], got torch.int64 of shape \(3,\)"),
    ],
)  # fmt: skip
def test_an_input_that_does_not_fit_is_an_error_that_names_it(place: int, wrong: Tensor, message: str) -> None:
    given = list(drawn())
    given[place] = wrong
    with pytest.raises(ValueError, match=message):
        paged_scores(*given)


def test_a_dtype_that_scores_cannot_have_is_named() -> None:
    with pytest.raises(ValueError, match=r"dtype: expected one of torch.float32, .*, got torch.int64"):
        paged_scores(*drawn(), torch.int64)
