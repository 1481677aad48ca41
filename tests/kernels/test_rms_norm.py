# SPDX-License-Identifier: Apache-2.0
"""RMSNorm against torch's own, and its invariants."""

import pytest
import torch

from kernels.rms_norm import rms_norm


def test_equals_torch_in_values_and_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 32, requires_grad=True)
    weight = torch.randn(32, requires_grad=True)
    expected = torch.nn.functional.rms_norm(x, (32,), weight, 1e-6)
    value = rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(value, expected)
    upstream = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(value, (x, weight), upstream), torch.autograd.grad(expected, (x, weight), upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_scale_of_the_input_does_not_matter() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    weight = torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(1000 * x, weight, 0.0), rms_norm(x, weight, 0.0))


def test_rows_without_any_signal_give_zeros_and_finite_gradients() -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    y = rms_norm(x, torch.ones(5))
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 5))
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_no_rows_are_no_error() -> None:
    x = torch.zeros(0, 5, requires_grad=True)
    rms_norm(x, torch.ones(5)).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 5)


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(5, dtype=torch.float64)], ids=["width", "dtype"])
def test_a_foreign_weight_is_an_error_that_names_both(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"weight: expected torch.float32 of shape \(5,\), got"):
        rms_norm(torch.ones(2, 5), weight)
