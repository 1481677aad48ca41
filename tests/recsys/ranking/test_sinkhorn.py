# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.ranking.sinkhorn import sinkhorn

N = 32


def symmetric(n: int = N, seed: int = 0) -> Tensor:
    """Symmetric logits with entries from N(0, 1)."""
    a = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.triu(a) + torch.triu(a, 1).T


def permuted(n: int, seed: int = 0) -> Tensor:
    """A random permutation matrix."""
    return torch.eye(n, dtype=torch.float64)[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]


def column_error(matrix: Tensor) -> float:
    return (matrix.sum(-2) - 1).abs().max().item()


def row_error(matrix: Tensor) -> float:
    return (matrix.sum(-1) - 1).abs().max().item()


def test_it_is_alternating_normalisation_of_columns_and_rows() -> None:
    logits = torch.randn(3, 7, 7, dtype=torch.float64)
    expected = np.exp(logits.numpy())
    for iterations in (1, 2, 5):
        matrix = expected
        for _ in range(iterations):
            matrix = matrix / matrix.sum(1, keepdims=True)
            matrix = matrix / matrix.sum(2, keepdims=True)
        np.testing.assert_allclose(sinkhorn(logits, iterations).numpy(), matrix, rtol=1e-12)


def test_damped_scaling_is_its_definition() -> None:
    logits = symmetric(6)
    scale = np.ones(6)
    for iterations in (1, 2, 3):
        scale = np.sqrt(scale / (np.exp(logits.numpy()) @ scale))
        expected = np.outer(scale, scale) * np.exp(logits.numpy())
        np.testing.assert_allclose(sinkhorn(logits, iterations, damped=True).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("damped", [False, True])
def test_leading_axes_are_batches(damped: bool) -> None:
    logits = torch.stack([symmetric(5, seed) for seed in range(6)]).reshape(2, 3, 5, 5)
    batched = sinkhorn(logits, 4, damped=damped)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(batched[i, j], sinkhorn(logits[i, j], 4, damped=damped))


# The published rates, give or take two orders of magnitude: alternating scaling converges fast at τ = 1 and slowly at τ = 0.05, and
# damped scaling several times slower.
@pytest.mark.parametrize(
    ("temperature", "damped", "iterations", "low", "high"),
    [
        (1.0, False, 5, 1e-9, 1e-4),
        (1.0, False, 10, 0.0, 1e-9),
        (1.0, False, 20, 0.0, 1e-13),
        (0.05, False, 20, 1e-2, 1.0),
        (0.05, False, 100, 1e-4, 0.1),
        (1.0, True, 5, 1e-3, 0.1),
        (1.0, True, 10, 1e-5, 1e-2),
        (1.0, True, 20, 1e-9, 1e-4),
        (1.0, True, 100, 0.0, 1e-13),
    ],
)
def test_rates_of_convergence(temperature: float, damped: bool, iterations: int, low: float, high: float) -> None:
    errors = [column_error(sinkhorn(symmetric(seed=seed) / temperature, iterations, damped=damped)) for seed in range(5)]
    assert low <= np.median(errors) <= high


def test_small_logits_converge_at_once_even_at_low_temperature() -> None:
    logits = 0.02 * torch.randn(10, N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert column_error(sinkhorn((logits + logits.mT) / 2 / 0.05, 5)) < 1e-10


def test_alternating_rows_sum_to_one_at_any_number_of_iterations() -> None:
    for iterations in (1, 3):
        matrix = sinkhorn(symmetric() / 0.05, iterations)
        assert row_error(matrix) < 1e-12 < column_error(matrix)


def test_damped_scaling_is_exactly_symmetric_and_has_the_same_limit() -> None:
    logits = symmetric()
    for iterations in (1, 2, 7):
        matrix = sinkhorn(logits / 0.05, iterations, damped=True)
        assert torch.equal(matrix, matrix.T)
    asymmetric = sinkhorn(logits / 0.05, 20)
    assert (asymmetric - asymmetric.T).abs().max() > 1e-3
    torch.testing.assert_close(sinkhorn(logits, 200, damped=True), sinkhorn(logits, 200), rtol=0, atol=1e-14)


@pytest.mark.parametrize("damped", [False, True])
def test_it_commutes_with_permutations(damped: bool) -> None:
    logits, p = symmetric() / 0.2, permuted(N)
    expected = p @ sinkhorn(logits, 7, damped=damped) @ p.T
    torch.testing.assert_close(sinkhorn(p @ logits @ p.T, 7, damped=damped), expected, rtol=1e-10, atol=1e-14)


def test_rows_and_columns_permute_independently() -> None:
    logits, p, q = torch.randn(9, 9, dtype=torch.float64), permuted(9, 1), permuted(9, 2)
    torch.testing.assert_close(sinkhorn(p @ logits @ q, 3), p @ sinkhorn(logits, 3) @ q, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("damped", [False, True])
def test_high_temperatures_give_the_uniform_matrix(damped: bool) -> None:
    uniform = torch.full((N, N), 1 / N, dtype=torch.float64)
    distance = [(sinkhorn(symmetric() / t, damped=damped) - uniform).abs().max().item() for t in (1.0, 1e2, 1e4, 1e6)]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 1e-6
    assert distance[0] > 1e-2


def test_constants_added_to_rows_and_columns_change_nothing_in_the_limit() -> None:
    logits, rows, columns = torch.randn(8, 8), torch.randn(8, 1), torch.randn(1, 8)
    logits, rows, columns = logits.double(), rows.double(), columns.double()
    torch.testing.assert_close(sinkhorn(logits + rows + columns, 200), sinkhorn(logits, 200), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "temperature"), [(16, 0.05), (256, 0.05), (256, 0.2), (4, 1.0)])
@pytest.mark.parametrize("damped", [False, True])
def test_one_pass_is_exact_for_permutation_logits(n: int, temperature: float, damped: bool) -> None:
    target = torch.eye(n, dtype=torch.float64).flip(0)  # an involution
    odds = math.exp(1 / temperature)
    for iterations in (1, 20):
        matrix = sinkhorn(target / temperature, iterations, damped=damped)
        expected = (1 + (odds - 1) * target) / (odds + n - 1)
        torch.testing.assert_close(matrix, expected, rtol=1e-12, atol=0)
        assert (matrix - target).abs().max().item() == pytest.approx((n - 1) / (odds + n - 1), rel=1e-6)


def test_the_published_errors_of_the_permutation() -> None:
    for n, temperature, error in ((16, 0.05, 3.1e-8), (256, 0.05, 5.3e-7), (256, 0.2, 0.632)):
        target = torch.eye(n, dtype=torch.float64)
        assert (sinkhorn(target / temperature, 1) - target).abs().max().item() == pytest.approx(error, rel=0.02)


def test_a_symmetric_matrix_cannot_come_near_a_cycle() -> None:
    cycle = torch.eye(12, dtype=torch.float64).roll(1, 0)
    assert (sinkhorn(cycle / 0.05) - cycle).abs().max() < 1e-6
    assert (sinkhorn((cycle + cycle.T) / 2 / 0.05) - cycle).abs().max().item() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("damped", [False, True])
def test_gradients_agree_with_finite_differences(temperature: float, damped: bool) -> None:
    def call(x: Tensor) -> Tensor:
        return sinkhorn((x + x.mT) / 2 / temperature, 6, damped=damped)

    assert torch.autograd.gradcheck(call, torch.randn(2, 4, 4, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("damped", [False, True])
def test_gradients_pass_the_limit_of_exponentials(damped: bool) -> None:
    logits = (1e4 * symmetric(8)).float().requires_grad_()
    matrix = sinkhorn(logits, damped=damped)
    matrix.square().sum().backward()
    assert matrix.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("damped", [False, True])
def test_it_works_in_float32_or_better(damped: bool) -> None:
    logits = symmetric().to(torch.bfloat16)
    matrix = sinkhorn(logits, damped=damped)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, sinkhorn(logits.float(), damped=damped))
    assert sinkhorn(logits.double(), damped=damped).dtype == torch.float64
    torch.testing.assert_close(matrix.double(), sinkhorn(logits.double(), damped=damped), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("damped", [False, True])
def test_compiled_without_graph_breaks_it_equals_eager(damped: bool) -> None:
    compiled, logits = torch.compile(sinkhorn, backend="aot_eager", fullgraph=True), symmetric(5).requires_grad_()
    torch.testing.assert_close(compiled(logits, 3, damped=damped), sinkhorn(logits, 3, damped=damped))


@pytest.mark.parametrize("damped", [False, True])
def test_no_entry_is_denormal_however_sharp_the_logits(damped: bool) -> None:
    """Denormal factors make a product of matrices ten times slower."""
    logits = 100 * torch.eye(16)
    matrix = sinkhorn(logits, 200, damped=damped)
    assert ((matrix == 0) | (matrix >= 1e-27)).all()
    torch.testing.assert_close(matrix, torch.eye(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize("damped", [False, True])
def test_the_compilers_operation_is_the_function_and_its_gradient(damped: bool) -> None:
    logits = torch.randn(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = (logits + logits.mT).requires_grad_()
    weight = torch.randn(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (sinkhorn, torch.ops.recsys.sinkhorn):
        logits.grad = None
        matrix = function(logits, 7, damped=damped)
        (matrix * weight).sum().backward()
        results.append((matrix.detach(), logits.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-12, atol=1e-14)
    torch.library.opcheck(torch.ops.recsys.sinkhorn.default, (logits, 7, damped))


def test_a_compiled_caller_holds_one_operation() -> None:
    seen = []

    def backend(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module

    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda x: sinkhorn(x / 0.5) * 2, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(logits), sinkhorn(logits / 0.5) * 2)
    assert len(seen) == 3 and any("sinkhorn" in name for name in seen)
