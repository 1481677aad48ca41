# SPDX-License-Identifier: Apache-2.0
"""Sums of squares on the CPU: a norm of each part, which forms no tensor of squares, and one product for the gradient."""

import torch
from torch import Tensor


def forward(x: Tensor) -> Tensor:
    """``x [B, T, P, w]`` → ``[B, T, P]``, contiguous, in float32 (float64 for float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    sums: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=wide).square_()
    return sums.contiguous()


def backward(dsums: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x [B, T, P, w]``, which lies in memory as x does, given that of the sums ``[B, T, P]``."""
    return torch.mul(x, 2 * dsums[..., None], out=torch.empty_like(x))
