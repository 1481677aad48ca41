# SPDX-License-Identifier: Apache-2.0
"""Inner products of queries with keys that lie scattered in a pool.

Source: the paged dot-product kernel of TokenSelect (arXiv 2411.02886), whose pages hold one key. There query head h takes key head
``h % H_kv``; here it takes ``h // (H / H_kv)``, as grouped heads have it everywhere else.
"""

import torch
from torch import Tensor


def paged_scores(q: Tensor, pages: Tensor, slots: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition: gather, then multiply.

    Args:
        q: ``[B, H, e]``, one query of each row.
        pages: ``[P, H_kv, e]``, the pool; H_kv divides H.
        slots: int32 or int64 ``[S]``, where each row's keys lie; -1 for none, which scores -∞.
        offsets: int32 or int64 ``[B + 1]``: the slots of row b are ``offsets[b]:offsets[b + 1]``.
        dtype: of the result.

    Returns:
        ``[H, S]``, computed in float32 (float64 for float64).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    row = torch.arange(len(q), device=q.device).repeat_interleave(offsets.diff(), output_size=len(slots))
    keys_she = pages[slots.clamp(min=0)].to(wide).repeat_interleave(q.shape[1] // pages.shape[1], 1)
    scores = torch.einsum("she,she->hs", q[row].to(wide), keys_she)
    return scores.masked_fill(slots < 0, -torch.inf).to(dtype)
