# SPDX-License-Identifier: Apache-2.0
"""The per-token SwiGLU of TokenMixer-Large (arXiv 2602.06563, eqs. 17-18) with a row scale and a residual, in float32.

With ``[g, u] = s · (x @ gate_up)`` for each token: ``y = r + (silu(g) ⊙ u) @ down``.
"""

import torch
from torch import Tensor
from torch.nn import functional


def token_swiglu(x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """The definition.

    Args:
        x: ``[B, T, D]``, float32, bfloat16, float16 or float64.
        gate_up: for each token its gate matrix, then its up matrix: ``[T, D, 2H]``.
        down: ``[T, H, D]``.
        scale: s, ``[B, T]`` in float32 (float64 for float64): the reciprocal root mean square of a norm whose gain is folded into
            ``gate_up``. None for 1.
        residual: r, ``[B, T, D]``. None for 0.

    Returns:
        ``[B, T, D]`` in the dtype of ``x``. Everything is computed in float32 (float64 for float64).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    product = torch.einsum("btd,tdh->bth", x.to(wide), gate_up.to(wide))
    gate, up = (product if scale is None else product * scale[..., None]).chunk(2, dim=-1)
    y = torch.einsum("bth,thd->btd", functional.silu(gate) * up, down.to(wide))
    return (y if residual is None else y + residual).to(x.dtype)
