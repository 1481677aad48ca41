# SPDX-License-Identifier: Apache-2.0
"""The log-partition in Triton's interpreter: parts of the catalogue and of the states, slices of wide vectors, float16's range, layouts."""

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.catalogue_loss import OP, triton_ops, weighted_log_partition
from kernels.testing import assert_matches_reference, error_ratio


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return OP.inputs(shape, dtype, torch.Generator().manual_seed(0))


def found(states: Tensor, items: Tensor, weights: Tensor, upstream: float = 1.0) -> tuple[Tensor, ...]:
    with backend.use("triton"):
        value = weighted_log_partition(states, items, weights)
        return value.detach(), *torch.autograd.grad(value.sum() * upstream, (states, items))


def test_parts_of_the_catalogue_and_of_the_states_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "PART", 64)
    assert triton_ops._parts(300, 300 // 64, 64) == (3, 128)
    with backend.use("triton"):
        assert_matches_reference(OP, (3, 2, 300, 8), torch.float32)
        assert_matches_reference(OP, (1030, 1, 3, 4), torch.float32)


def test_a_state_does_not_see_which_others_come_with_it() -> None:
    states, items, weights = drawn((70, 1, 130, 16))
    _, together, _ = found(states, items, weights)
    _, alone, _ = found(states[:3].detach().requires_grad_(), items, weights[:3])
    assert torch.equal(together[:3], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_probabilities_and_weights_below_float16s_range_still_count(dtype: torch.dtype) -> None:
    """Half of all items are alike, and weights are those of a million targets; the upstream gradient is a loss scale."""
    states, items, _ = drawn((5, 1, 200, 8), dtype)
    weights, scale = torch.full((5,), 1e-6), 2.0**16
    items.data[:100] = items.data[0]
    value, *gradients = found(states, items, weights, scale)
    wide = [x.detach().double().requires_grad_() for x in (states, items)]
    expected = OP.reference(*wide, weights.double())
    assert value.dtype == torch.float32 and error_ratio(value * 1e6, expected.detach() * 1e6) < 2e-6
    for mine, theirs in zip(gradients, torch.autograd.grad(expected.sum() * scale, wide), strict=True):
        assert error_ratio(mine.double() * 1e3, theirs * 1e3) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_other_layouts_in_memory_give_the_same() -> None:
    """Slots outermost, a view that starts between 16 bytes, and every second element."""
    states, items, weights = drawn((5, 3, 70, 16))
    expected = found(states, items, weights)
    shifted = torch.zeros(1 + items.numel())[1:].view_as(items).copy_(items.detach()).requires_grad_()
    turned = states.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    spread = torch.stack((states.detach(), states.detach()), -1)[..., 0].requires_grad_()
    for given in ((turned, items), (states, shifted), (spread, items)):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found(*given, weights), expected, strict=True))


def test_huge_logits_stay_finite_and_choose_one() -> None:
    states, items = (1e3 * torch.eye(8)[:, None]).requires_grad_(), (1e3 * torch.eye(8)[:, None]).requires_grad_()
    value, dstates, ditems = found(states, items, torch.full((8,), 0.25))
    assert value.tolist() == [2e6]
    torch.testing.assert_close(dstates, 0.25 * items.detach(), rtol=0, atol=0)
    torch.testing.assert_close(ditems, 0.25 * states.detach(), rtol=0, atol=0)


def test_without_states_or_weights_there_is_no_gradient() -> None:
    states, items, weights = drawn((4, 2, 6, 5))
    value, _, ditems = found(states[:0].detach().requires_grad_(), items, weights[:0])
    assert value.tolist() == [0.0, 0.0] and torch.equal(ditems, torch.zeros_like(items))
    value, dstates, ditems = found(states, items, torch.tensor([0.0, -0.0, 0.0, 0.0]))
    assert value.tolist() == [0.0, 0.0]
    assert all(torch.equal(x, torch.zeros_like(x)) for x in (dstates, ditems))


def test_float64_takes_the_other_way() -> None:
    states, items, weights = drawn((4, 2, 6, 5), torch.float64)
    assert not triton_ops.supports(states)
    value, dstates, _ = found(states, items, weights)
    torch.testing.assert_close(value, OP.reference(states, items, weights).detach())
    (expected,) = torch.autograd.grad(OP.reference(states, items, weights).sum(), states)
    torch.testing.assert_close(dstates, expected)
