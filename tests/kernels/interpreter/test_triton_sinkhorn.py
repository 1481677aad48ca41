# SPDX-License-Identifier: Apache-2.0
"""The implicit gradient of Sinkhorn in Triton: the contract's tests run the unrolled one."""

import pytest
import torch

from kernels import backend
from kernels.sinkhorn import cpu, sinkhorn, triton_ops


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n", [1, 5, 33, 64])
def test_the_implicit_gradient_is_that_of_the_cpu(n: int, symmetric: bool) -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, n, n, generator=random, requires_grad=True)
    upstream = torch.randn(2, n, n, generator=random)
    found = {}
    for chosen in ("cpu", "triton"):
        with backend.use(chosen):
            matrix = sinkhorn(logits, 0.7, 15, symmetric, implicit=True)
            found[chosen] = (matrix, *torch.autograd.grad(matrix, logits, upstream))
    for mine, theirs in zip(found["triton"], found["cpu"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_last_duals_alone_are_kept() -> None:
    logits, temperature = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
    for implicit in (False, True):
        _, duals = triton_ops.forward(logits, temperature, 4, True, implicit)
        _, expected = cpu.forward(logits, temperature, 4, True, implicit)
        torch.testing.assert_close(duals, expected)


def test_sharp_logits_stay_finite_and_larger_matrices_take_the_other_way() -> None:
    logits = (5 * torch.eye(8).roll(3, 0)).requires_grad_()
    with backend.use("triton"):
        for implicit in (False, True):
            matrix = sinkhorn(logits, 0.05, 20, implicit=implicit)
            torch.testing.assert_close(matrix, logits.detach() / 5, rtol=0, atol=1e-6)
            (gradient,) = torch.autograd.grad(matrix.square().sum(), logits)
            assert gradient.abs().max() < 1e-4
        large = torch.randn(1, 129, 129, generator=torch.Generator().manual_seed(0))
        assert not triton_ops.supports(large)
        torch.testing.assert_close(sinkhorn(large, 1.0, 2).sum(2), torch.ones(1, 129))
        assert sinkhorn(torch.zeros(0, 4, 4)).shape == (0, 4, 4)
