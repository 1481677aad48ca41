# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

from recsys.retrieval import softmax
from recsys.retrieval.softmax import catalogue_cross_entropy


def example(states=40, slots=3, dim=4, items=11, targets=60, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    s = torch.randn(states, slots, dim, generator=g, dtype=dtype, requires_grad=True)
    e = torch.randn(items, slots, dim, generator=g, dtype=dtype, requires_grad=True)
    return s, e, torch.randint(items, (targets,), generator=g), torch.randint(states, (targets,), generator=g)


def brute_force(s, e, targets, of_target):
    logits = torch.einsum("snd,cnd->nsc", s, e)
    return torch.stack([F.cross_entropy(slot[of_target], targets) for slot in logits])


@pytest.mark.parametrize("chunk", [1, 11 * 17, 1 << 19])
def test_losses_and_gradients_equal_torch_cross_entropy(monkeypatch, chunk):
    monkeypatch.setitem(softmax._CHUNK, "cpu", chunk)
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
