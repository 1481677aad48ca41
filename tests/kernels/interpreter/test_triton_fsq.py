# SPDX-License-Identifier: Apache-2.0
"""FSQ in Triton: the bits of the CPU wherever no level is near a tie."""

import pytest
import torch

from kernels import backend
from kernels.fsq import fsq, reference, triton_ops


@pytest.mark.parametrize(("form", "levels"), [("tanh", (8, 5, 6)), ("tanh", (1000,)), ("sigmoid", (7, 5, 2)), ("sigmoid", (1 << 20,))])
def test_levels_and_codes_are_those_of_the_cpu_to_the_last_bit(form, levels: tuple[int, ...]) -> None:
    z = 2 * torch.randn(500, len(levels), generator=torch.Generator().manual_seed(0))
    fraction = reference.bound(z.double(), levels, form) % 1
    clear = ((fraction - 0.5).abs() > 1e-6 * max(levels)).all(-1) if max(levels) < 1 << 18 else torch.zeros(500, dtype=torch.bool)
    z = torch.cat((z[clear], torch.tensor([-100.0, 100.0, -1e30, 1e30])[:, None].expand(4, len(levels))))
    expected, expected_index = fsq(z, levels, form)
    with backend.use("triton"):
        values, index = fsq(z, levels, form)
    assert torch.equal(index, expected_index)
    assert torch.equal(values, expected)
    assert torch.equal(torch.signbit(values), torch.signbit(expected))


def test_codes_beyond_int32_are_exact_and_nothing_is_no_error() -> None:
    with backend.use("triton"):
        _, index = fsq(torch.tensor([-30.0, 30.0])[:, None].expand(2, 6), (1000,) * 6)
        assert index.tolist() == [0, 1000**6 - 1]
        assert fsq(torch.zeros(0, 2), (5, 5))[1].shape == (0,)


def test_halves_are_rounded_to_even() -> None:
    """b is exactly 3.5 and 4.5 at zero."""
    with backend.use("triton"):
        _, index = fsq(torch.zeros(1, 2), (8, 10), "sigmoid")
    assert index.item() == 4 + 8 * 4


def test_saturated_gradients_are_finite() -> None:
    z = torch.tensor([[-1e30, 30.0]])
    for form in ("tanh", "sigmoid"):
        assert triton_ops.backward(torch.ones(1, 2), z, (5, 5), form).abs().max() < 1e-10
