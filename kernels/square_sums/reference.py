# SPDX-License-Identifier: Apache-2.0
"""Sums of squares of the parts of a tensor: ``s[b, t, p] = Σ_i x[b, t, p, i]²``, in float32."""

import torch
from torch import Tensor


def square_sums(x: Tensor) -> Tensor:
    """The definition.

    Args:
        x: ``[B, T, P, w]``, float32, bfloat16, float16 or float64.

    Returns:
        ``[B, T, P]`` in float32 (float64 for float64).
    """
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1)
