# SPDX-License-Identifier: Apache-2.0
"""RMSNorm (Zhang & Sennrich, arXiv 1910.07467): ``y = γ · x / sqrt(mean(x²) + ε)``, the mean over the last axis, in float32."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition.

    Args:
        x: ``[..., N]``, float32, bfloat16, float16 or float64.
        weight: γ, ``[N]``, the dtype of ``x``.
        eps: ε, inside the square root.

    Returns:
        ``[..., N]`` in the dtype of ``x``. Statistics and products are computed in float32 (float64 for float64).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)
