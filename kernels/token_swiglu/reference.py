# SPDX-License-Identifier: Apache-2.0
"""The per-token SwiGLU of TokenMixer-Large (arXiv 2602.06563, eqs. 17-18) with a row scale and a residual, in float32.

With ``[g, u] = s · (x @ gate_up)`` for each token: ``y = r + (silu(g) ⊙ u) @ down``. A token may lie in P parts of w numbers, D = P·w.
"""

import torch
from torch import Tensor
from torch.nn import functional


def token_swiglu(x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """The definition.

    Args:
        x: ``[B, T, D]`` or ``[B, T, P, w]``, float32, bfloat16, float16 or float64.
        gate_up: for each token its gate matrix, then its up matrix: ``[T, D, 2H]``.
        down: ``[T, H, D]``.
        scale: s, ``[B, T]`` in float32 (float64 for float64): the reciprocal root mean square of a norm whose gain is folded into
            ``gate_up``. None for 1.
        residual: r, the shape of ``x``. None for 0.

    Returns:
        The shape and the dtype of ``x``. Everything is computed in float32 (float64 for float64).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    product = torch.einsum("btd,tdh->bth", x.flatten(2).to(wide), gate_up.to(wide))
    gate, up = (product if scale is None else product * scale[..., None]).chunk(2, dim=-1)
    y = torch.einsum("bth,thd->btd", functional.silu(gate) * up, down.to(wide)).reshape(x.shape)
    return (y if residual is None else y + residual).to(x.dtype)
