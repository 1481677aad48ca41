# SPDX-License-Identifier: Apache-2.0
"""Attention of blocks of queries to keys that were chosen for each block, by index.

Sources of choices: TokenSelect (arXiv 2411.02886), FASA, HISA and DHSA, whose modules stand in `recsys.efficiency.attention`.
"""

import torch
from torch import Tensor
from torch.nn import functional


def selected_attention(q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, last: Tensor | None, scale: float) -> Tensor:
    """The definition: the chosen rows are gathered for each block, then softmax attention over them.

    Args:
        q: ``[B, H, T, e]``, float32, bfloat16, float16 or float64. T queries form Q blocks of ``ceil(T / Q)`` adjacent ones.
        k: ``[B, H_kv, N, e]``; H_kv divides H, and key head g serves the query heads ``g H / H_kv`` onwards.
        v: ``[B, H_kv, N, e_v]``.
        index: int32 or int64 ``[B, G, Q, K]``, places of keys, G of 1, H_kv or H. A key that is listed twice counts twice.
        valid: bool, the same shape: which entries count; the others may be any number.
        last: int64 or int32 ``[T]``: a query reads the keys at places up to its own number; None where it reads all of its block's.
        scale: of the inner products.

    Returns:
        ``[B, H, T, e_v]`` in the dtype of ``q``, zeros for a query that reads nothing. Computed in float32 (float64 for float64).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    (_, heads, length, _), blocks = q.shape, index.shape[2]
    size = -(-length // blocks)
    index_bhqk = index.long().masked_fill(~valid, 0).repeat_interleave(heads // index.shape[1], 1)
    valid_bhqk = valid.repeat_interleave(heads // index.shape[1], 1)
    keys, values = (_gather(x.to(wide).repeat_interleave(heads // x.shape[1], 1), index_bhqk) for x in (k, v))
    missing = blocks * size - length
    q_bhqte = functional.pad(q.to(wide), (0, 0, 0, missing)).unflatten(2, (blocks, size))
    seen = valid_bhqk[..., None, :].expand(-1, -1, -1, size, -1)
    if last is not None:
        seen = seen & (index_bhqk[..., None, :] <= functional.pad(last, (0, missing), value=-1).view(blocks, size, 1))
    scores = q_bhqte @ keys.mT * scale
    nothing = ~seen.any(-1, keepdim=True)  # softmax over nothing would be NaN, in the gradient too
    weights = scores.masked_fill(~(seen | nothing), -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
    y: Tensor = (weights @ values).flatten(2, 3)[:, :, :length].to(q.dtype)
    return y


def _gather(x_bhne: Tensor, index_bhqk: Tensor) -> Tensor:
    """``[B, H, Q, K, e]``."""
    rows = index_bhqk.flatten(2)[..., None].expand(-1, -1, -1, x_bhne.shape[3])
    gathered: Tensor = x_bhne.gather(2, rows).unflatten(2, index_bhqk.shape[2:])
    return gathered
