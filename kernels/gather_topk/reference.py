# SPDX-License-Identifier: Apache-2.0
"""The best items by sums of their codes' numbers, in plain numpy."""

import numpy as np
import torch
from torch import Tensor


def gather_topk(values_bkv: Tensor, codes_nk: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """``s(b, i) = Σ_k values[b, k, codes[i, k]]`` for all items, and the k best of each user: score descending, then row ascending.

    Args:
        values_bkv: float ``[B, K, V]``.
        codes_nk: int64 ``[N, K]``.
        k: of a list.

    Returns:
        Rows int64 and scores float32 ``[B, k]``; -1 and -inf where there are no more items above -inf.
    """
    scores_bn = torch.zeros(len(values_bkv), len(codes_nk))
    for slot in range(codes_nk.shape[1]):
        scores_bn = scores_bn + values_bkv[:, slot, codes_nk[:, slot]]
    rows, scores = np.full((len(values_bkv), k), -1, np.int64), np.full((len(values_bkv), k), -np.inf, np.float32)
    for user, own in enumerate(scores_bn.numpy()):
        order = np.lexsort((np.arange(len(own)), -own))[:k]
        order = order[own[order] > -np.inf]
        rows[user, : len(order)], scores[user, : len(order)] = order, own[order]
    return rows, scores
