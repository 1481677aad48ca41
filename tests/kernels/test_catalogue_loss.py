# SPDX-License-Identifier: Apache-2.0
"""The log-partition over a catalogue: torch's cross-entropy as an oracle, both ways of the CPU, memory, and errors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from kernels import backend
from kernels.catalogue_loss import OP, cpu, weighted_log_partition
from kernels.testing import assert_matches_reference, error_ratio, most_held

S, N, C, D = 40, 3, 50, 6


def drawn(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (S, N, C, D)) -> tuple[Tensor, Tensor, Tensor]:
    return OP.inputs(shape, dtype, torch.Generator().manual_seed(0))


@pytest.fixture(params=["at_once", "twice", "twice_in_small_tiles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of the CPU, whatever the size of the catalogue."""
    monkeypatch.setattr(cpu, "_LOGITS", 1)
    monkeypatch.setattr(cpu, "_ROWS", 7)
    if request.param != "at_once":
        monkeypatch.setattr(cpu, "LIMIT", 0)
    if request.param == "twice_in_small_tiles":
        monkeypatch.setitem(cpu._TILES, "cpu", (7, 9))


def cross_entropy(states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """``[n]`` by the op: the log-partition less the mean logit of one target for each state."""
    even = torch.full((len(states),), 1 / len(states), dtype=states.dtype)
    return weighted_log_partition(states, items, even) - (states * items[targets]).sum(2).mean(0)


def brute_force(states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    return torch.stack([functional.cross_entropy(states[:, k] @ items[:, k].T, targets) for k in range(states.shape[1])])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_equals_torch_cross_entropy_in_values_and_gradients(scale: float) -> None:
    states, items, _ = drawn()
    targets, upstream = torch.arange(S) % C, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    mine, theirs = cross_entropy(states * scale, items, targets), brute_force(states * scale, items, targets)
    torch.testing.assert_close(mine, theirs)
    gradients = (torch.autograd.grad(loss, (states, items), upstream) for loss in (mine, theirs))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_way_equals_the_reference(dtype: torch.dtype) -> None:
    assert_matches_reference(OP, (S, N, C, D), dtype)
    assert_matches_reference(OP, (1, 1, 1, 1), dtype)


@pytest.mark.usefixtures("way")
def test_huge_logits_of_float32_lose_nothing_beyond_their_own_rounding() -> None:
    """One logit leads each state by more than float32 can tell from infinity, so that the softmax is a choice of one."""
    states = (1e3 * torch.eye(8)[torch.arange(20) % 8])[:, None].requires_grad_()
    items = (1e3 * torch.eye(8))[:, None].requires_grad_()
    value = weighted_log_partition(states, items, torch.full((20,), 0.25))
    assert value.tolist() == [5e6]
    dstates, ditems = torch.autograd.grad(value.sum(), (states, items))
    torch.testing.assert_close(dstates, 0.25 * items[torch.arange(20) % 8], rtol=0, atol=0)
    torch.testing.assert_close(ditems[:, 0], torch.diag(torch.tensor([3.0] * 4 + [2.0] * 4) * 250), rtol=0, atol=0)


@pytest.mark.usefixtures("way")
def test_a_state_without_weight_does_not_count_and_a_negative_weight_counts_against() -> None:
    states, items, weights = drawn()
    weights[::2], weights[1] = torch.tensor([0.0, -0.0], dtype=torch.float64).repeat(S // 4), -0.3
    value = weighted_log_partition(states, items, weights)
    dstates, ditems = torch.autograd.grad(value.sum(), (states, items))
    assert torch.equal(dstates[::2], torch.zeros_like(dstates[::2]))
    some = states[1::2].detach().requires_grad_()
    alone = weighted_log_partition(some, items, weights[1::2])
    torch.testing.assert_close(value, alone)
    for found, expected in zip((dstates[1::2], ditems), torch.autograd.grad(alone.sum(), (some, items)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("way")
def test_no_states_are_no_loss_and_no_gradient() -> None:
    states, items, weights = drawn(torch.float32)
    value = weighted_log_partition(states[:0], items, weights[:0])
    assert value.tolist() == [0.0] * N
    (gradient,) = torch.autograd.grad(value.sum(), items)
    assert torch.equal(gradient, torch.zeros_like(items))


@pytest.mark.usefixtures("way")
def test_one_candidate_has_the_weighted_logit_for_its_partition() -> None:
    states, items, weights = drawn()
    value = weighted_log_partition(states, items[:1], weights)
    torch.testing.assert_close(value, torch.einsum("s,snd,nd->n", weights, states, items[0]))


@pytest.mark.usefixtures("way")
def test_adding_a_vector_to_all_items_adds_its_logits() -> None:
    states, items, weights = drawn()
    shift = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    added = torch.einsum("s,snd,nd->n", weights, states, shift)
    value = weighted_log_partition(states, items, weights)
    torch.testing.assert_close(weighted_log_partition(states, items + shift, weights), value + added)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_with_float32_weights_is_a_float32_loss(dtype: torch.dtype) -> None:
    """Logits and sums in float32: as exact as float32 of the same rounded vectors. Weights are as small as those of a large batch."""
    states, items, weights = drawn(dtype)
    weights = weights.float() * 1e-3
    value = weighted_log_partition(states, items, weights)
    assert value.dtype == torch.float32
    assert error_ratio(value.detach(), OP.reference(states.double(), items.double(), weights.double()).detach()) < 2e-6
    with torch.autocast("cpu", torch.bfloat16):
        again = weighted_log_partition(states, items, weights)
        gradients = torch.autograd.grad(again.sum() * 2.0**10, (states, items))
    assert torch.equal(again, value)
    wide = [x.detach().double().requires_grad_() for x in (states, items)]
    expected = torch.autograd.grad(OP.reference(*wide, weights.double()).sum() * 2.0**10, wide)
    for mine, theirs in zip(gradients, expected, strict=True):
        assert mine.dtype == dtype and error_ratio(mine, theirs) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.usefixtures("way")
def test_autocast_changes_nothing() -> None:
    states, items, weights = drawn(torch.float32)
    expected = torch.autograd.grad(weighted_log_partition(states, items, weights).sum(), (states, items))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(weighted_log_partition(states, items, weights).sum(), (states, items))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.usefixtures("way")
def test_a_graph_that_is_kept_can_go_backward_again_but_has_no_second_derivative() -> None:
    states, items, weights = drawn()
    value = weighted_log_partition(states, items, weights).sum()
    once, twice = (torch.autograd.grad(value, (states, items), torch.tensor(a).double(), retain_graph=True) for a in (1.0, 2.0))
    for one, two in zip(once, twice, strict=True):
        torch.testing.assert_close(2 * one, two)
    (gradient,) = torch.autograd.grad(value, states, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.square().sum().backward()


def test_gradients_are_formed_along_with_the_value_only_where_they_are_wanted() -> None:
    states, items, weights = drawn(torch.float32)
    product = 2 * S * N * C * D

    def counted(call: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return int(counter.get_total_flops())

    assert counted(lambda: weighted_log_partition(states, items, weights)) == 3 * product
    assert counted(lambda: weighted_log_partition(states.detach(), items.detach(), weights)) == product
    with torch.no_grad():
        assert counted(lambda: weighted_log_partition(states, items, weights)) == product
    kept = torch.ops.recsys.catalogue_log_partition(states.detach(), items.detach(), weights, False)[2:]
    assert [x.numel() for x in kept] == [0, 0]
    assert counted(lambda: weighted_log_partition(states, items, weights).sum().backward()) == 3 * product


def test_the_second_way_counts_its_four_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LIMIT", 0)
    states, items, weights = drawn(torch.float32)
    with FlopCounterMode(display=False) as counter:
        weighted_log_partition(states, items, weights).sum().backward()
    assert counter.get_total_flops() == 4 * 2 * S * N * C * D


@pytest.mark.parametrize(("candidates", "held"), [(cpu.LIMIT, 4 * cpu._LOGITS), (cpu.LIMIT + 1, 0)])
def test_memory_is_a_tenth_of_that_of_the_plain_loss(candidates: int, held: int) -> None:
    """By torch's own record of allocations, the gradients included in both; beside the logits that are held where there are few items."""
    states, items, weights = drawn(torch.float32, (512, 1, candidates, 8))
    targets = torch.zeros(512, dtype=torch.int64)
    mine = most_held(lambda: torch.autograd.grad(weighted_log_partition(states, items, weights).sum(), (states, items)))
    plain = most_held(lambda: torch.autograd.grad(functional.cross_entropy(states[:, 0] @ items[:, 0].T, targets), (states, items)))
    assert plain > 2 * 512 * candidates * 4
    assert mine < held + 0.1 * 2 * 512 * candidates * 4


def test_the_reference_backend_has_the_same_gradients() -> None:
    states, items, weights = drawn()
    expected = torch.autograd.grad(OP.reference(states, items, weights).sum(), (states, items))
    with backend.use("reference"):
        found = torch.autograd.grad(weighted_log_partition(states, items, weights).sum(), (states, items))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.ones(S, D), r"states_snd: expected floats \[S, n, d\] with d at least 1, got torch.float32 \(40, 6\)"),
        (0, torch.ones(S, N, D, dtype=torch.int64), r"states_snd: expected floats \[S, n, d\] with d at least 1, got torch.int64"),
        (1, torch.ones(C, N, D + 1), r"items_cnd: expected torch.float32 \[C, 3, 6\] .*, got torch.float32 \(50, 3, 7\)"),
        (1, torch.ones(0, N, D), r"items_cnd: expected .* with C at least 1, as states_snd, got torch.float32 \(0, 3, 6\)"),
        (1, torch.ones(C, N, D).half(), r"items_cnd: expected torch.float32 .*, got torch.float16 \(50, 3, 6\)"),
        (2, torch.ones(S + 1), r"weights_s: expected torch.float32 \[40\], got torch.float32 \(41,\)"),
        (2, torch.ones(S).bfloat16(), r"weights_s: expected torch.float32 \[40\], got torch.bfloat16 \(40,\)"),
        (2, torch.ones(S, requires_grad=True), r"weights_s: expected constants, got a tensor that asks for a gradient"),
    ],
)
def test_an_input_that_does_not_fit_is_an_error_that_names_it(place: int, wrong: Tensor, message: str) -> None:
    given = list(drawn(torch.float32))
    given[place] = wrong
    with pytest.raises(ValueError, match=message):
        weighted_log_partition(*given)
