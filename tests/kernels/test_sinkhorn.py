# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn against the model's and its own identities; the implicit gradient against the unrolled one and a linear solver."""

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.sinkhorn import cpu, sinkhorn
from recsys.ranking.sinkhorn import sinkhorn as of_the_model

WAYS: tuple[backend.Backend, ...] = ("native", "cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.2, 0.05])
def test_is_what_the_model_computes(symmetric: bool, temperature: float) -> None:
    logits = drawn(3, 12, 12).requires_grad_()
    made = (logits + logits.mT) / 2 if symmetric else logits
    expected = of_the_model(made / temperature, 20)
    found = sinkhorn(logits, temperature, 20, symmetric)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
    upstream = drawn(3, 12, 12, seed=1)
    (gradient,) = torch.autograd.grad(found, logits, upstream)
    (wanted,) = torch.autograd.grad(expected, logits, upstream)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("spread", "implicit"), [(0.3, False), (3.0, False), (20.0, False), (80.0, False), (0.3, True), (20.0, True)])
def test_scaled_matrices_of_the_loop_are_as_exact_as_logarithms(spread: float, implicit: bool) -> None:
    """Small logits stay within reach of one matrix; large ones leave it, and it is formed again or not used."""
    logits, upstream = spread * drawn(4, 33, 33), drawn(4, 33, 33, seed=1)

    def found(way: backend.Backend, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        own = logits.to(dtype).requires_grad_()
        with backend.use(way):
            y = sinkhorn(own, 1.0, 20, implicit=implicit)
            return y.detach().double(), torch.autograd.grad(y, own, upstream.to(dtype))[0].double()

    expected = found("reference", torch.float64)
    errors = [[float((a - b).norm() / b.norm()) for a, b in zip(found(way, torch.float32), expected, strict=True)] for way in WAYS]
    for of_loop, of_torch in zip(*errors, strict=True):
        assert of_loop <= 8 * of_torch + 1e-6


def test_both_ops_stand_beside_each_other() -> None:
    """Two registrations under one name would take each other's place in silence."""
    logits = drawn(1, 4, 4)
    torch.testing.assert_close(torch.ops.recsys.sinkhorn(logits, 5, False), sinkhorn(logits, 1.0, 5))


def test_rows_sum_to_one_and_columns_in_the_limit() -> None:
    logits = drawn(4, 32, 32)
    few, many = sinkhorn(logits, 0.5, 2), sinkhorn(logits, 0.5, 300)
    torch.testing.assert_close(few.sum(2), torch.ones(4, 32, dtype=torch.float64))
    assert (few.sum(1) - 1).abs().max() > 1e-3
    torch.testing.assert_close(many.sum(1), torch.ones(4, 32, dtype=torch.float64))


def test_constants_of_rows_and_columns_change_nothing_in_the_limit() -> None:
    logits, rows, columns = drawn(2, 9, 9), drawn(2, 9, 1, seed=1), drawn(2, 1, 9, seed=2)
    torch.testing.assert_close(sinkhorn(logits + rows + columns, 1.0, 200), sinkhorn(logits, 1.0, 200), rtol=0, atol=1e-12)


def test_two_by_two_in_closed_form() -> None:
    """The limit has p / (1 − p) = sqrt(a d / (b c)) on its diagonal."""
    (a, b), (c, d) = logits = torch.tensor([[0.3, -1.0], [0.5, 2.0]], dtype=torch.float64)
    p = torch.sigmoid((a + d - b - c) / 2)
    expected = torch.stack((torch.stack((p, 1 - p)), torch.stack((1 - p, p))))
    torch.testing.assert_close(sinkhorn(logits, 1.0, 100), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_implicit_gradient_is_the_unrolled_one_where_the_sums_are_one(symmetric: bool) -> None:
    logits = (0.5 * drawn(3, 16, 16)).requires_grad_()
    upstream = drawn(3, 16, 16, seed=1)
    matrix = sinkhorn(logits, 0.5, 20, symmetric)
    assert (matrix.sum(1) - 1).abs().max() < 1e-6
    (unrolled,) = torch.autograd.grad(matrix, logits, upstream)
    (implicit,) = torch.autograd.grad(sinkhorn(logits, 0.5, 20, symmetric, implicit=True), logits, upstream)
    torch.testing.assert_close(implicit, unrolled, rtol=1e-5, atol=1e-8)
    single = logits.detach().float().requires_grad_()
    (single_implicit,) = torch.autograd.grad(sinkhorn(single, 0.5, 20, symmetric, implicit=True), single, upstream.float())
    torch.testing.assert_close(single_implicit.double(), unrolled, rtol=1e-4, atol=1e-5)


def test_the_implicit_gradient_solves_the_conditions_of_the_limit() -> None:
    """∂L/∂A = g − P ∘ (α + β), where (α, β) solves the equations that keep all sums at one; by least squares, they are singular."""
    logits = drawn(7, 7).requires_grad_()
    upstream = drawn(7, 7, seed=1)
    p = sinkhorn(logits, 1.0, 200, implicit=True)
    (found,) = torch.autograd.grad(p, logits, upstream)
    p = p.detach()
    g, one = upstream * p, torch.eye(7, dtype=torch.float64)
    system = torch.cat((torch.cat((one, p), 1), torch.cat((p.T, one), 1)))
    solved = torch.linalg.lstsq(system, torch.cat((g.sum(1), g.sum(0)))[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(found, g - p * (solved[:7, None] + solved[None, 7:]), rtol=1e-9, atol=1e-12)


def test_the_implicit_gradient_is_another_one_before() -> None:
    logits = (20 * drawn(1, 16, 16)).requires_grad_()
    matrix = sinkhorn(logits, 1.0, 3)
    assert (matrix.sum(1) - 1).abs().max() > 1e-2
    (unrolled,) = torch.autograd.grad(matrix.square().sum(), logits)
    (implicit,) = torch.autograd.grad(sinkhorn(logits, 1.0, 3, implicit=True).square().sum(), logits)
    assert (unrolled - implicit).abs().max() > 1e-2


@pytest.mark.parametrize("implicit", [False, True])
def test_a_permutation_is_no_trouble(implicit: bool) -> None:
    logits = (5 * torch.eye(8)[torch.randperm(8, generator=torch.Generator().manual_seed(0))]).requires_grad_()
    matrix = sinkhorn(logits, 0.05, 20, implicit=implicit)
    (gradient,) = torch.autograd.grad((matrix * torch.arange(64.0).view(8, 8)).sum(), logits)
    torch.testing.assert_close(matrix, logits.detach() / 5, rtol=0, atol=1e-6)
    assert ((matrix == 0) | (matrix > 1e-26)).all()
    assert gradient.abs().max() < 1e-4


def test_duals_are_kept_for_every_iteration_or_for_the_last() -> None:
    logits, temperature = drawn(2, 6, 6), torch.tensor(1.0, dtype=torch.float64)
    _, every = cpu.forward(logits, temperature, 5, False, False)
    _, last = cpu.forward(logits, temperature, 5, False, True)
    assert every.shape == (2, 5, 2, 6)
    assert torch.equal(every[:, -1:], last)


def test_leading_axes_and_none_at_all() -> None:
    logits = drawn(2, 3, 5, 5)
    found = sinkhorn(logits, 0.5, 4)
    assert torch.equal(found[1, 2], sinkhorn(logits[1, 2], 0.5, 4))
    empty = torch.zeros(0, 4, 4, requires_grad=True)
    sinkhorn(empty).sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 4, 4)


def test_the_temperature_may_be_a_tensor() -> None:
    logits = drawn(4, 4).float()
    assert torch.equal(sinkhorn(logits, torch.tensor(0.3, dtype=torch.float64)), sinkhorn(logits, 0.3))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"logits: expected floating-point \[\.\.\., n, n\], got torch.float32 of shape \(2, 3\)"):
        sinkhorn(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"logits: expected floating-point \[\.\.\., n, n\], got torch.int64"):
        sinkhorn(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="iterations: expected at least 1, got 0"):
        sinkhorn(torch.zeros(2, 2), 1.0, 0)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature: expected a positive number, got"):
            sinkhorn(torch.zeros(2, 2), wrong)
    with pytest.raises(ValueError, match=r"temperature: expected a scalar .* got shape \(1,\) with requires_grad=False"):
        sinkhorn(torch.zeros(2, 2), torch.ones(1))
    with pytest.raises(ValueError, match=r"got shape \(\) with requires_grad=True"):
        sinkhorn(torch.zeros(2, 2), torch.tensor(1.0, requires_grad=True))
