# SPDX-License-Identifier: Apache-2.0
"""The best items by sums of their codes' numbers, in plain torch."""

import torch
from torch import Tensor


def gather_topk(
    values_bkv: Tensor,
    codes_nk: Tensor,
    rows: Tensor | None = None,
    excluded_offsets: Tensor | None = None,
    excluded: Tensor | None = None,
    k: int = 1,
) -> tuple[Tensor, Tensor]:
    """``s(b, i) = Σ_k values[b, k, codes[i, k]]``, and the k best of each user: score descending, then row ascending.

    See `kernels.gather_topk.best_items` for what the arguments are. Slots are added in their order, in float32 (float64 for float64).

    Returns:
        Rows int64 and scores ``[B, k]``, in the dtype of the values; -1 and -inf where there are no more items above -inf. NaN is no score.
    """
    wide = torch.promote_types(values_bkv.dtype, torch.float32)
    scores_bn = values_bkv.new_zeros(len(values_bkv), len(codes_nk), dtype=wide)
    for slot in range(codes_nk.shape[1]):
        scores_bn = scores_bn + values_bkv[:, slot].to(wide)[:, codes_nk[:, slot]]
    if excluded is not None and excluded_offsets is not None:
        users = torch.arange(len(values_bkv), device=excluded.device)
        scores_bn[users.repeat_interleave(excluded_offsets.diff(), output_size=len(excluded)), excluded] = -torch.inf
    numbers = torch.arange(len(codes_nk), device=values_bkv.device) if rows is None else rows
    scores, order = scores_bn[:, numbers].nan_to_num_(-torch.inf, torch.inf, -torch.inf).sort(dim=1, descending=True, stable=True)
    missing = max(0, k - scores.shape[1])
    best = torch.nn.functional.pad(scores[:, :k], (0, missing), value=-torch.inf)
    found = torch.nn.functional.pad(numbers[order[:, :k]], (0, missing))
    return found.masked_fill(best == -torch.inf, -1), best.to(values_bkv.dtype)
