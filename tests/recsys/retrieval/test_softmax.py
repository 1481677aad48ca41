# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

from kernels.catalogue_loss import cpu
from recsys.retrieval.softmax import catalogue_cross_entropy, sampled_cross_entropy


def example(states=40, slots=3, dim=4, items=11, targets=60, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    s = torch.randn(states, slots, dim, generator=g, dtype=dtype, requires_grad=True)
    e = torch.randn(items, slots, dim, generator=g, dtype=dtype, requires_grad=True)
    return s, e, torch.randint(items, (targets,), generator=g), torch.randint(states, (targets,), generator=g)


def brute_force(s, e, targets, of_target):
    logits = torch.einsum("snd,cnd->nsc", s, e)
    return torch.stack([F.cross_entropy(slot[of_target], targets) for slot in logits])


@pytest.mark.parametrize("limit", [0, cpu.LIMIT])
def test_losses_and_gradients_equal_torch_cross_entropy(monkeypatch, limit):
    """With gradients formed along with the value, and without."""
    monkeypatch.setattr(cpu, "LIMIT", limit)
    s, e, targets, of_target = example()
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    ours, theirs = (loss(s, e, targets, of_target) for loss in (catalogue_cross_entropy, brute_force))
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, (s, e), upstream), torch.autograd.grad(theirs, (s, e), upstream), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    s, e, targets, of_target = example(states=3, slots=2, dim=2, items=4, targets=5)
    assert torch.autograd.gradcheck(lambda s, e: catalogue_cross_entropy(s, e, targets, of_target), (s, e))


def test_no_gradient_is_computed_where_none_is_wanted():
    s, e, targets, of_target = example()
    with torch.no_grad():
        loss = catalogue_cross_entropy(s, e, targets, of_target)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, brute_force(s, e, targets, of_target).detach())


def test_large_logits_do_not_overflow():
    s, e, targets, of_target = example(dtype=torch.float32)
    torch.testing.assert_close(
        catalogue_cross_entropy(s * 1e3, e, targets, of_target), brute_force(s * 1e3, e, targets, of_target), rtol=1e-4, atol=1e-2
    )


def test_a_second_derivative_is_an_error():
    s, e, targets, of_target = example()
    (gradient,) = torch.autograd.grad(catalogue_cross_entropy(s, e, targets, of_target).sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.square().sum().backward()


def test_no_targets_is_no_loss():
    s, e, targets, of_target = example()
    loss = catalogue_cross_entropy(s[:0], e, targets[:0], of_target[:0])
    assert loss.tolist() == [0.0, 0.0, 0.0]
    loss.sum().backward()
    assert e.grad.abs().max() == 0


def test_computes_in_float32_under_autocast():
    s, e, targets, of_target = example(dtype=torch.float32)
    expected = catalogue_cross_entropy(s, e, targets, of_target)
    with torch.autocast("cpu", torch.bfloat16):
        loss = catalogue_cross_entropy(s, e, targets, of_target)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    half = catalogue_cross_entropy(s.bfloat16(), e.bfloat16(), targets, of_target)
    assert half.dtype == torch.float32
    half.sum().backward()
    assert s.grad.isfinite().all()


def one_slot():
    s, e, targets, of_target = example(slots=1)
    return s[:, 0], e[:, 0], targets, of_target


def test_every_candidate_once_is_the_full_softmax():
    s, e, targets, of_target = one_slot()
    drawn = torch.randperm(11)
    ours = sampled_cross_entropy(s, e, targets, of_target, drawn, torch.full((11,), 1 / 11, dtype=torch.float64))
    theirs = brute_force(s[:, None], e[:, None], targets, of_target)[0]
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, (s, e)), torch.autograd.grad(theirs, (s, e)), strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_the_partition_is_estimated_without_bias_whatever_the_candidates_are_drawn_by():
    """Over all single draws, weighted by their probability, of one state and one target."""
    s, e, _, _ = one_slot()
    q = torch.rand(11, dtype=torch.float64).softmax(0)
    for state, target in ((0, 3), (5, 10)):
        logits = s[state] @ e.T
        zero, of = torch.tensor([target]), torch.tensor([state])
        losses = torch.stack([sampled_cross_entropy(s, e, zero, of, torch.tensor([j]), q) for j in range(11)])
        partitions = (losses + logits[target]).exp()  # of the target and the drawn one
        torch.testing.assert_close((q * partitions).sum(), logits.exp().sum())


def test_a_sample_without_another_candidate_or_without_targets_is_a_loss_of_zero():
    s, e, _, _ = one_slot()
    evenly = torch.full((11,), 1 / 11, dtype=torch.float64)
    hit = sampled_cross_entropy(s, e, torch.tensor([4]), torch.tensor([2]), torch.tensor([4, 4]), evenly)
    nothing = sampled_cross_entropy(s, e, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.tensor([1]), evenly)
    for loss in (hit, nothing):
        gradients = torch.autograd.grad(loss, (s, e))
        assert float(loss.detach()) == 0.0 and all(bool(g.isfinite().all()) for g in gradients)


def test_many_draws_come_near_the_full_softmax():
    s, e, targets, of_target = one_slot()
    exact = brute_force(s[:, None], e[:, None], targets, of_target)[0]
    evenly, generator = torch.full((11,), 1 / 11, dtype=torch.float64), torch.Generator().manual_seed(0)
    gaps = []
    for count in (20, 20_000):
        drawn = torch.randint(11, (count,), generator=generator)
        gaps.append(abs(float((sampled_cross_entropy(s, e, targets, of_target, drawn, evenly) - exact).detach())))
    assert gaps[1] < 0.01 < gaps[0]
