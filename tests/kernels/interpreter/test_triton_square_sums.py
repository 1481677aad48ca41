# SPDX-License-Identifier: Apache-2.0
"""Sums of squares in Triton's interpreter: memory layouts that the shared test does not have, and a last block that is not full."""

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.square_sums import square_sums, triton_ops
from kernels.testing import unwritten_is_nan


def forms(width: int) -> dict[str, Tensor]:
    """``[3, 5, 7, width]`` each: tokens as they are, batch innermost, with gaps after each part, and one token for all."""
    x = torch.randn(3, 5, 7, width, generator=torch.Generator().manual_seed(0))
    return {
        "tokens": x,
        "batch innermost": x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
        "gaps": torch.cat((x, torch.full_like(x, torch.nan)), -1)[..., :width],
        "expanded": x[:, :1].expand(-1, 5, -1, -1),
    }


@pytest.mark.parametrize("form", list(forms(1)))
@pytest.mark.parametrize("width", [1, 8, 20])
def test_any_layout_gives_the_same_sums_and_a_gradient_that_lies_as_x_does(width: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "_TILE", 64)
    monkeypatch.setattr(triton_ops, "_COLUMNS", 16)
    x = forms(width)[form].detach().requires_grad_()
    upstream = torch.randn(3, 1, 7).expand(-1, 5, -1)
    with backend.use("triton"), unwritten_is_nan():
        sums = square_sums(x)
        (dx,) = torch.autograd.grad(sums, x, upstream)
    assert sums.is_contiguous() and dx.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(sums, x.detach().square().sum(-1))
    torch.testing.assert_close(dx, 2 * x.detach() * upstream[..., None])


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4)])
def test_no_rows_are_no_error(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    with backend.use("triton"):
        square_sums(x).sum().backward()
    assert x.grad is not None and x.grad.shape == shape
