# SPDX-License-Identifier: Apache-2.0
"""The one place that gathers chosen keys and attends to them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.selected_attention import selected_attention
from recsys.core.errors import ConfigError
from recsys.efficiency.selection import BlockSelection


def sparse_attend(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, query_positions: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention of each query to the keys that its block reads: the op `kernels.selected_attention`, with its arguments checked.

    Reading all keys is dense attention. A query that reads no key gets zeros. Gradients flow through the gathered rows; the choice itself
    is a constant.

    Args:
        q: ``[B, H, T, e]``. T queries form Q = ``selection.index.shape[2]`` blocks of ``ceil(T / Q)`` adjacent ones.
        k: ``[B, H_kv, N, e]``; H_kv divides H, and key head g serves the query heads g H / H_kv onwards.
        v: ``[B, H_kv, N, e_v]``.
        selection: of 1, H_kv or H groups.
        query_positions: int64 ``[T]``: a query reads the keys of its block that do not stand behind it. None where all may be read.
        scale: of the inner products; 1 / √e if None.

    Returns:
        ``[B, H, T, e_v]``.

    Raises:
        ConfigError: the groups or the blocks do not fit the heads or the queries.
    """
    (batch, heads, length, _), key_heads = q.shape, k.shape[1]
    _, groups, blocks, _ = selection.index.shape
    if len(selection.index) != batch:
        raise ConfigError(f"selection: expected one for a batch of {batch}, got {len(selection.index)}")
    if heads % key_heads or groups not in (1, key_heads, heads):
        raise ConfigError(
            f"selection: expected 1, {key_heads} or {heads} groups for {heads} heads over {key_heads} key heads, got {groups}"
        )
    if not 1 <= blocks <= length:
        raise ConfigError(f"selection: expected 1 to {length} blocks for {length} queries, got {blocks}")
    size = -(-length // blocks)
    if -(-length // size) != blocks:
        raise ConfigError(f"selection: {length} queries cannot form {blocks} blocks of equal size")
    return selected_attention(q, k, v, selection.index, selection.valid, query_positions, scale)


def gather_keys(x_bhne: Tensor, index_bgqk: Tensor) -> Tensor:
    """``[B, H, N, e]`` to ``[B, H, Q, K, e]``: the rows that each block reads; G is 1 or H."""
    batch, heads, _, width = x_bhne.shape
    _, groups, blocks, kept = index_bgqk.shape
    index = index_bgqk.long().reshape(batch, groups, blocks * kept)
    if batch == 1 and groups == 1:
        return x_bhne.index_select(2, index[0, 0]).view(1, heads, blocks, kept, width)
    first = x_bhne.shape[2] * torch.arange(batch * heads, device=index.device).view(batch, heads, 1)
    rows = x_bhne.reshape(-1, width).index_select(0, (first + index).flatten())  # several times faster on a CPU than `gather`
    return rows.view(batch, heads, blocks, kept, width)


def dense_attend(
    q: Tensor, k: Tensor, v: Tensor, *, query_positions: Tensor | None = None, lengths: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """What every sparse form falls back to and is compared with: `sparse_attend` without a choice.

    Args:
        q: see `sparse_attend`.
        k: see `sparse_attend`.
        v: see `sparse_attend`.
        query_positions: see `sparse_attend`.
        lengths: int64 ``[B]``, the keys that each right-padded row has; None where all have N.
        scale: see `sparse_attend`.
    """
    causal = (
        query_positions is not None and q.shape[2] == k.shape[2] and torch.equal(query_positions, torch.arange(k.shape[2], device=q.device))
    )
    if lengths is None and (causal or query_positions is None):
        whole: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return whole
    mask = allowed_keys(k.shape[2], query_positions, lengths, q.device)
    return masked_attend(q, k, v, mask.expand(-1, -1, q.shape[2], -1), scale)


def allowed_keys(keys: int, last: Tensor | None, lengths: Tensor | None, device: torch.device) -> Tensor:
    """bool ``[B or 1, 1, Q or 1, keys]``: the keys that a row has and that do not stand behind a block's ``last`` readable place.

    Args:
        keys: N.
        last: int64 ``[Q]``; None for all.
        lengths: int64 ``[B]``; None where all rows have N keys.
        device: of the result.
    """
    place = torch.arange(keys, device=device)
    allowed = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=device)
    if last is not None:
        allowed = allowed & (place <= last[None, None, :, None])
    if lengths is not None:
        allowed = allowed & (place < lengths[:, None, None, None])
    return allowed


def masked_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Fused attention to what a bool mask allows, with zeros for a query that may read nothing, and no NaN in its gradient."""
    none = ~mask.any(-1, keepdim=True)
    attended: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | none, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return attended.masked_fill(none, 0.0)
