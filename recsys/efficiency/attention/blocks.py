# SPDX-License-Identifier: Apache-2.0
"""Exact attention of blocks of adjacent queries to gathered segments of keys, for the forms that choose by block.

A causal block reads some segments that end before it begins, which need no mask, and all of its own places, which need the same
triangle in every block: one small mask for all, with which PyTorch's fused kernel is as fast as without. Only where a row is shorter than
its block, each block gets a mask of its own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.efficiency.attend import masked_attend

_GATHERED = 1 << 22  # numbers that are gathered at once
_SCORED = 1 << 22  # choices that are judged at once


@dataclass(frozen=True)
class QueryBlocks:
    """T queries in Q blocks of s slots.

    Attributes:
        size: places of a block among the keys.
        home: int64 ``[Q]``: block q stands at the places from ``home[q] * size``.
        offset: int64 ``[1 or Q, s]``, the place of each query within its block; None where queries have no place among the keys.
        left: empty slots before the first query.
        queries: T.
    """

    size: int
    home: Tensor
    offset: Tensor | None
    left: int
    queries: int

    @classmethod
    def aligned(cls, positions: Tensor, size: int) -> "QueryBlocks":
        """Blocks that begin at multiples of ``size``, so that a prompt in parts is cut like the whole.

        Queries at ascending ``positions`` int64 ``[T]``, T at least 1; where places are left out or said twice each is a block of its own.
        """
        home, queries = positions // size, len(positions)
        if bool(home[0] == home[-1]):
            return cls(size, home[:1], (positions % size)[None], 0, queries)
        if bool((positions[1:] - positions[:-1] == 1).all()):
            slots = torch.arange(size, device=positions.device)[None]
            return cls(
                size, torch.arange(int(home[0]), int(home[-1]) + 1, device=positions.device), slots, int(positions[0]) % size, queries
            )
        return cls(size, home, (positions % size)[:, None], 0, queries)

    @classmethod
    def placeless(cls, queries: int, size: int, device: torch.device) -> "QueryBlocks":
        """Blocks of ``size`` adjacent queries that read without a causal order."""
        return cls(size, torch.arange(-(-queries // size), device=device), None, 0, queries)

    @property
    def slots(self) -> int:
        """Queries of a full block."""
        return self.size if self.offset is None else int(self.offset.shape[1])

    def pack(self, x_bhte: Tensor) -> Tensor:
        """``[B, H, T, e]`` to ``[B, H, Q, s, e]``, zeros in empty slots."""
        right = len(self.home) * self.slots - self.left - self.queries
        padded = F.pad(x_bhte, (0, 0, self.left, right)) if self.left or right else x_bhte
        return padded.reshape(*padded.shape[:2], len(self.home), self.slots, -1)

    def unpack(self, x_bhqse: Tensor) -> Tensor:
        """``[B, H, Q, s, e]`` to ``[B, H, T, e]``."""
        return x_bhqse.flatten(2, 3)[:, :, self.left : self.left + self.queries]

    def first_queries(self, q: Tensor) -> Tensor:
        """``[B, H, Q, e]``: the first query of each block."""
        slot = torch.zeros_like(self.home)
        slot[0] = self.left
        return self.pack(q)[:, :, torch.arange(len(slot), device=slot.device), slot]

    def sums(self, q: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sums ``[B, H, Q, e]`` of each block's queries, and int64 ``[B or 1, 1, Q, 1]`` their number.

        Args:
            q: ``[B, H, T, e]``.
            counts: int64 ``[B]``, the queries that each right-padded row has; None where all have T.
        """
        there = torch.ones(1, 1, self.queries, 1, dtype=torch.bool, device=q.device)
        if counts is not None:
            there = (torch.arange(self.queries, device=q.device) < counts[:, None])[:, None, :, None]
            q = q.masked_fill(~there, 0.0)
        return self.pack(q).sum(3), self.pack(there.long()).sum(3)


def block_slices(blocks: int, each: int, most: int) -> list[slice]:
    """Slices of the blocks, of which each needs ``each`` numbers, with at most ``most`` numbers in a slice."""
    step = max(1, most // max(each, 1))
    return [slice(at, min(at + step, blocks)) for at in range(0, blocks, step)]


def scored_slices(blocks: int, each: int) -> list[slice]:
    """Slices of blocks whose choices are made at once, to bound memory; each makes ``each`` choices."""
    return block_slices(blocks, each, _SCORED)


def attend_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: QueryBlocks,
    index: Tensor,
    valid: Tensor,
    unit: int,
    *,
    last: int = 0,
    lengths: Tensor | None = None,
    scale: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each block to its segments and, where the blocks have places, causally to the keys of its own places.

    Args:
        q: ``[B, H, T, e]``.
        k: ``[B, H_kv, N, e]``.
        v: ``[B, H_kv, N, e_v]``.
        blocks: of the queries.
        index: int ``[B, G, Q, S]``, G being 1 or H_kv: which segments of ``unit`` adjacent keys are read. None twice; in a causal block all
            end before it begins.
        valid: bool, the same shape: which entries count.
        unit: keys of a segment, a divisor of the block size.
        last: the highest place of a query.
        lengths: int64 ``[B]``, the keys that each right-padded row has.
        scale: of the inner products; 1 / √e if None.
        weights: the same shape as ``index``, by which keys and values of a segment are multiplied, or None.

    Returns:
        ``[B, H, T, e_v]``, zeros for a query that may read nothing.
    """
    (batch, heads), (key_heads, keys) = q.shape[:2], k.shape[1:3]
    groups, own = heads // key_heads, 0 if blocks.offset is None else blocks.size
    queries = _folded(blocks.pack(q), key_heads)
    tables = tuple(_segments(x, unit) for x in (k, v))
    limit = torch.full((batch,), keys, device=q.device) if lengths is None else lengths.clamp(max=keys)
    each = batch * key_heads * (index.shape[-1] * unit + own) * (k.shape[-1] + v.shape[-1])
    found = []
    for part in block_slices(len(blocks.home), each, _GATHERED):
        chosen = index[:, :, part].long()
        read = torch.cat((chosen, _own_segments(blocks, part, unit).expand(*chosen.shape[:3], -1)), -1) if own else chosen
        factor = None if weights is None else F.pad(weights[:, :, part], (0, own // unit), value=1.0)
        near, far = (_gathered(x, read, factor) for x in tables)
        mask = _mask(blocks, part, chosen, valid[:, :, part], unit, limit, last)
        found.append(_attended(queries[:, :, part], near, far, mask, groups, scale))
    attended = torch.cat(found, 2).view(batch, key_heads, len(blocks.home), groups, blocks.slots, -1)
    return blocks.unpack(attended.transpose(2, 3).flatten(1, 2))


def _folded(x_bhqse: Tensor, key_heads: int) -> Tensor:
    """``[B, H, Q, s, e]`` to ``[B, H_kv, Q, g s, e]``: the query heads of a key head behind one another."""
    batch, heads, blocks, slots, width = x_bhqse.shape
    grouped = x_bhqse.view(batch, key_heads, heads // key_heads, blocks, slots, width)
    return grouped.transpose(2, 3).reshape(batch, key_heads, blocks, -1, width)


def _segments(x_bhne: Tensor, unit: int) -> Tensor:
    """``[B, H, R, unit, e]``, zeros behind the last key."""
    missing = -x_bhne.shape[2] % unit
    padded = F.pad(x_bhne, (0, 0, 0, missing)) if missing else x_bhne
    return padded.reshape(*padded.shape[:2], -1, unit, padded.shape[3])


def _own_segments(blocks: QueryBlocks, part: slice, unit: int) -> Tensor:
    """int64 ``[Q, size / unit]``."""
    count = blocks.size // unit
    return blocks.home[part, None] * count + torch.arange(count, device=blocks.home.device)


def _gathered(table_bhrue: Tensor, index: Tensor, factor: Tensor | None) -> Tensor:
    """``[B, H, Q, S unit, e]``: whole segments copied at once; a place behind the last one is read as the last, and masked."""
    batch, heads, count, unit, width = table_bhrue.shape
    first = torch.arange(batch * heads, device=index.device).view(batch, heads, 1, 1) * count
    flat = (first + index.clamp(max=count - 1)).flatten()
    found = table_bhrue.reshape(batch * heads * count, unit * width).index_select(0, flat)
    found = found.view(batch, heads, *index.shape[2:], unit, width)
    if factor is not None:
        found = found * factor[..., None, None].to(found.dtype)
    return found.flatten(3, 4)


def _mask(blocks: QueryBlocks, part: slice, index: Tensor, valid: Tensor, unit: int, limit: Tensor, last: int) -> Tensor | None:
    """bool: ``[1 or Q, s, K]`` where it holds for all rows, else ``[B, G, Q, s, K]``; None where everything is read."""
    past, whole = index.shape[-1] * unit, bool(valid.all())
    if blocks.offset is None:
        if whole and bool(((index + 1) * unit <= limit.view(-1, 1, 1, 1)).all()):
            return None
        return _readable(index, valid, unit, limit)[..., None, :].expand(-1, -1, -1, blocks.slots, -1)
    offset = blocks.offset if len(blocks.offset) == 1 else blocks.offset[part]
    triangle = torch.arange(blocks.size, device=index.device) <= offset[..., None]
    causal = F.pad(triangle, (past, 0), value=True)
    if whole and min((int(blocks.home[part][-1]) + 1) * blocks.size - 1, last) < int(limit.min()):
        return causal
    own = blocks.home[part, None] * blocks.size + torch.arange(blocks.size, device=index.device)
    own = (own < limit[:, None, None]).unsqueeze(1).expand(*index.shape[:3], -1)
    return causal & torch.cat((_readable(index, valid, unit, limit), own), -1)[..., None, :]


def _readable(index: Tensor, valid: Tensor, unit: int, limit: Tensor) -> Tensor:
    """bool ``[B, G, Q, S unit]``: the keys of segments that count and that the row has."""
    place = index[..., None] * unit + torch.arange(unit, device=index.device)
    return (valid[..., None] & (place < limit.view(-1, 1, 1, 1, 1))).flatten(3, 4)


def _attended(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, groups: int, scale: float | None) -> Tensor:
    """``[B, H_kv, Q, g s, e_v]``."""
    batch, heads = queries.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (queries, keys, values))
    shape = (batch, heads, *queries.shape[2:4], values.shape[-1])
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).reshape(shape)
    if mask.dim() == 3:
        mask = mask.repeat(1, groups, 1)
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[0] if len(bias) == 1 else bias[None], scale=scale).reshape(shape)
    mask = mask.expand(-1, heads, -1, -1, -1).flatten(0, 1).repeat(1, 1, groups, 1)
    return masked_attend(q, k, v, mask, scale).reshape(shape)
