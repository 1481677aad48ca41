# SPDX-License-Identifier: Apache-2.0
"""Attention inside rows of different lengths that lie one after another, by softmax or by SiLU, causal over tokens or over items.

Sources: HSTU (Zhai et al., arXiv 2402.17152, eqs. 1-3) for the SiLU form and the bias; RecGPT (arXiv 2506.06270) for the mask
``grouped``; SETRec (arXiv 2502.10833) for ``prefix``: items whose tokens do not see each other, and queries that nobody sees.
"""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

Form: TypeAlias = Literal["softmax", "silu"]
Mask: TypeAlias = Literal["causal", "grouped", "prefix"]


def jagged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    form: str,
    mask: str,
    group: int,
    divisor: float,
    seen: Tensor | None,
) -> Tensor:
    """The definition, row by row: ``A V`` with ``A = softmax(S)`` or ``A = SiLU(S) / N``, where ``S = Q Kᵀ / √e + rab``.

    Args:
        q: ``[S, H, e]``, float32, bfloat16, float16 or float64; likewise ``k`` and ``v``.
        k: see ``q``.
        v: see ``q``.
        offsets: int64 ``[B + 1]``: row b is ``offsets[b]:offsets[b + 1]``.
        bias: rab, ``[H or 1, D]``, one number for each distance between two positions of a row. Distances from D on take the last one,
            and later tokens of the same item the first one, as `recsys.layers.hstu.HSTULayer` has it; None for zeros.
        form: "softmax" or "silu".
        mask: who is seen; see `visible`.
        group: tokens of an item, counted from the beginning of the row; the last item of a row may have fewer.
        divisor: N, of the SiLU form.
        seen: int64 ``[S]``, of the prefix mask: how many of its row's first tokens each token sees, no more than there are before it.

    Returns:
        ``[S, H, e]`` in the dtype of ``q``. Scores and weights are computed in float32 (float64 for float64).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = [q[:0]]
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        q_ihe, k_jhe, v_jhe = (x[start:end].to(wide) for x in (q, k, v))
        places = torch.arange(end - start, device=q.device)
        scores_hij = torch.einsum("ihe,jhe->hij", q_ihe, k_jhe) / math.sqrt(q.shape[2])
        if bias is not None:
            scores_hij = scores_hij + bias.to(wide)[:, distance(places, places, bias.shape[1])]
        hidden = ~visible(places, places, mask, group, None if seen is None else seen[start:end])
        if form == "softmax":
            weights_hij = scores_hij.masked_fill(hidden, -torch.inf).softmax(2)
        else:
            weights_hij = (functional.silu(scores_hij) / divisor).masked_fill(hidden, 0.0)
        rows.append(torch.einsum("hij,jhe->ihe", weights_hij, v_jhe).to(q.dtype))
    return torch.cat(rows)


def visible(i: Tensor, j: Tensor, mask: str, group: int, seen: Tensor | None) -> Tensor:
    """bool ``[…, I, J]``: whether the token at place i of a row sees that at place j.

    ``causal``: itself and those before. ``grouped``: all tokens of the items up to its own. ``prefix``: the first ``seen [..., I]`` tokens
    of the row, and itself.
    """
    i, j = i[:, None], j[None, :]
    if mask == "causal":
        return j <= i
    if mask == "grouped":
        return j // group <= i // group
    assert seen is not None
    return (j < seen[..., None]) | (j == i)


def distance(i: Tensor, j: Tensor, distances: int) -> Tensor:
    """int64 ``[I, J]``: which number of a bias with so many ``distances`` stands between the places i and j."""
    return (i[:, None] - j[None, :]).clamp(0, distances - 1)
