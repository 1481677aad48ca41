# SPDX-License-Identifier: Apache-2.0
"""The one place that gathers chosen keys and attends to them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.core.errors import ConfigError
from recsys.efficiency.selection import BlockSelection


def sparse_attend(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, *, query_positions: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention of each query to the keys that its block reads, through PyTorch's fused kernels.

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
    _, groups, blocks, kept = selection.index.shape
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
    if groups == heads > key_heads:
        return _by_key_head(q, k, v, selection, size, query_positions, scale)
    keys_bgqke, values_bgqke = (gather_keys(x, selection.index) for x in (k, v))
    q = F.pad(q, (0, 0, 0, blocks * size - length)) if blocks * size > length else q
    queries = q.view(batch, heads, blocks, size, q.shape[-1]).transpose(1, 2).flatten(0, 1)
    mask = _mask(selection, size, query_positions)
    if mask is not None:
        mask = mask.expand(batch, -1, -1, -1, -1).transpose(1, 2).flatten(0, 1)
        mask = mask if groups == 1 or groups == heads else mask.repeat_interleave(heads // groups, 1)
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (keys_bgqke, values_bgqke))
    if kept == 0:
        return q[:, :, :length].sum(-1, keepdim=True) * v.sum(2, keepdim=True)[:, :1] * 0.0  # zeros that have a gradient, of zeros
    if mask is None:
        attended = F.scaled_dot_product_attention(queries, keys, values, scale=scale, enable_gqa=key_heads != heads)
    else:
        attended = masked_attend(queries, keys, values, mask, scale)
    found: Tensor = attended.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
    return found


def _by_key_head(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, size: int, query_positions: Tensor | None, scale: float | None
) -> Tensor:
    """`sparse_attend` where each query head chooses: those of a key head are further blocks of its queries, so that no key is repeated."""
    key_heads, length, missing = k.shape[1], q.shape[2], selection.index.shape[2] * size - q.shape[2]
    queries, index, valid = (
        x.unflatten(1, (key_heads, -1)).flatten(2, 3) for x in (F.pad(q, (0, 0, 0, missing)), selection.index, selection.valid)
    )
    shared = q.shape[1] // key_heads
    positions = None if query_positions is None else F.pad(query_positions, (0, missing), value=-1).repeat(shared)
    found = sparse_attend(queries, k, v, BlockSelection(index, valid), query_positions=positions, scale=scale)
    apart: Tensor = found.unflatten(2, (shared, -1)).flatten(1, 2)[:, :, :length]
    return apart


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


def _mask(selection: BlockSelection, size: int, query_positions: Tensor | None) -> Tensor | None:
    """bool ``[B, G, Q, size, K]``: what each query may read; None where that is all of it."""
    if query_positions is None:
        return None if bool(selection.valid.all()) else selection.valid[..., None, :].expand(-1, -1, -1, size, -1)
    blocks = selection.index.shape[2]
    padded = F.pad(query_positions, (0, blocks * size - len(query_positions)), value=-1).view(blocks, size, 1)
    mask = selection.valid[..., None, :] & (selection.index[..., None, :] <= padded)
    return None if bool(mask.all()) else mask


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
