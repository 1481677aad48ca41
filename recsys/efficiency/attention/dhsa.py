# SPDX-License-Identifier: Apache-2.0
"""Dynamic hierarchical sparse attention: chunks of any length are scored, their tokens are read up to a budget."""

from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from recsys.core.components import register
from recsys.core.errors import DataError
from recsys.efficiency.attend import dense_attend
from recsys.efficiency.attention.base import SelectedAttention, SparseAttentionConfig
from recsys.efficiency.attention.blocks import QueryBlocks, attend_segments, scored_slices
from recsys.efficiency.attention.boundaries import BoundaryPredictor
from recsys.efficiency.selection import BlockSelection
from recsys.efficiency.view import row_of

Begins: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""Where chunks begin: bool ``[B, N]``, or jagged places within a row, int64 ``[S]``, with their offsets int64 ``[B + 1]``."""


@dataclass(frozen=True)
class Chunks:
    """The chunks of B rows.

    Attributes:
        starts: int64 ``[B, C]``, their first places, ascending; N behind a row's last chunk.
        chunk: int64 ``[B, N]``, the chunk of each token.
        sums: float64 ``[B, H_kv, P + 1, e]``: the sum of the first p pieces. A new piece begins with each chunk and each block.
        pieces: int64 ``[B, N + 1]``: how many pieces begin before each place.
        ends: int64 ``[B]``, the keys of each row.
        delay: a chunk is known to begin once so many of its tokens are.
    """

    starts: Tensor
    chunk: Tensor
    sums: Tensor
    pieces: Tensor
    ends: Tensor
    delay: int = 0

    @classmethod
    def of(cls, k: Tensor, begins: Tensor, lengths: Tensor | None, block: int, delay: int = 0) -> "Chunks":
        """Chunks of keys ``[B, H_kv, N, e]`` that begin where bool ``[B, N]`` says, and with each row's first token.

        Keys are added up to pieces in float32 or wider, pieces to prefix sums in float64: no long sum in few digits, and few prefix sums.
        """
        keys = k.shape[2]
        place = torch.arange(keys, device=k.device)
        ends = torch.full((len(k),), keys, device=k.device) if lengths is None else lengths.clamp(max=keys)
        begins = (begins | (place == 0)) & (place < ends[:, None])
        starts = torch.where(begins, place, keys).sort(dim=1).values[:, : max(1, int(begins.sum(1).max()))]
        piece = (begins | (place % block == 0) | (place == ends[:, None])).long().cumsum(1)
        chunk = (begins.long().cumsum(1) - 1).clamp(min=0)
        return cls(starts, chunk, _prefix_sums(k, piece - 1), F.pad(piece, (1, 0)), ends, delay)

    def vectors(self, start: Tensor, end: Tensor) -> Tensor:
        """The sums of the keys from ``start`` to before ``end`` over the root of their number: ``[B, H_kv, C, e]`` of int64 ``[B, C]``.

        Both are places where a chunk or a block begins, or a row ends.
        The root makes the variance of a product with independent keys the same for every length (§3.2 of the paper).
        """
        places = (self.pieces.gather(1, x)[:, None, :, None].expand(-1, self.sums.shape[1], -1, self.sums.shape[3]) for x in (start, end))
        first, last = (self.sums.gather(2, x) for x in places)
        return (last - first) / (end - start).clamp(min=1).double().sqrt()[:, None, :, None]

    def last_known(self, before: Tensor) -> Tensor:
        """int64 ``[B, Q]``: the last chunk that is known to have begun, given the tokens ``before`` int64 ``[B, Q]``."""
        known = self.starts[:, None, :] + max(self.delay, 1) <= before[..., None]
        return (known.sum(-1) - 1).clamp(min=0)


@register("sparse_attention", "dhsa")
class DHSA(SelectedAttention):
    """Chunk vectors are scored for blocks of queries, each token has its chunk's score, and the best are read (DHSA, §7).

    A chunk's vector is the sum of its keys over the root of their number, a block's the same of its queries. All heads share a choice (by
    the mean of their products) unless ``per_key_head``. Blocks begin at multiples of ``query_block``. Of equal scores the later token is
    read first, so that a budget cuts a chunk to its most recent tokens.

    The paper lets a block see keys up to its end, the mean of its queries, and boundaries that later tokens decide. Here nothing behind a
    query has a say: a block is scored against keys before it begins, a chunk that is not complete there counts with what it has, and
    the block's own keys are read in any case, under a causal mask. Its query is its first one (``block_query: mean`` is the paper's: then
    a block's later queries choose for its earlier ones). A learned boundary counts once the keys that the predictor read for it are
    there. Each block reads ``budget - query_block`` earlier keys, or all there are: attention is dense where the budget covers the row in
    whole blocks.

    Without ``query_positions`` all keys are scored, by the mean of a block's queries, and ``budget`` of them are read.
    """

    class Config(SparseAttentionConfig):
        """What is read.

        Attributes:
            budget: keys that a block reads; in the causal form with its own.
            query_block: queries of a block.
            chunk_size: tokens of a chunk, where boundaries are neither given nor learned.
            n_local: last keys before the block that are read in any case.
            n_global: first keys of a row that are read in any case.
            block_query: see the class.
            per_key_head: whether each key head chooses for itself.
            instruction_tokens: so many last queries of a row read everything, where there are as many queries as keys.
            predictor: of boundaries; null for chunks of ``chunk_size``.
        """

        name: Literal["dhsa"] = "dhsa"
        budget: int = Field(2048, ge=1)
        query_block: int = Field(128, ge=1)
        chunk_size: int = Field(64, ge=1)
        n_local: int = Field(128, ge=0)
        n_global: int = Field(128, ge=0)
        block_query: Literal["first", "mean"] = "first"
        per_key_head: bool = False
        instruction_tokens: int = Field(0, ge=0)
        predictor: BoundaryPredictor.Config | None = None

        @model_validator(mode="after")
        def _forced_fit(self) -> Self:
            if self.budget < self.query_block + self.n_local + self.n_global:
                raise ValueError(
                    f"budget: expected at least query_block + n_local + n_global, "
                    f"{self.query_block + self.n_local + self.n_global}, got {self.budget}"
                )
            return self

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.predictor = None if config.predictor is None else BoundaryPredictor(config.predictor)

    @property
    def causal(self) -> bool:
        """See `SparseAttention.causal`."""
        return self.config.block_query == "first"

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_positions: Tensor | None,
        lengths: Tensor | None,
        scale: float | None,
        boundaries: Begins | None = None,
    ) -> Tensor:
        """See `SparseAttention.attend`.

        Args:
            q: as there.
            k: as there.
            v: as there.
            query_positions: as there.
            lengths: as there.
            scale: as there.
            boundaries: where chunks begin, sessions for example; see `Begins`. A row's first token begins one in any case.
        """
        chunks = self.chunks(k, lengths, query_positions is not None, boundaries)
        return self._attend(q, k, v, query_positions, lengths, scale, chunks)

    @torch.no_grad()
    def chunks(self, k: Tensor, lengths: Tensor | None, causal: bool, boundaries: Begins | None = None) -> Chunks:
        """The chunks of keys ``[B, H_kv, N, e]``: given ones, learned ones, or of a fixed size."""
        block = self.config.query_block
        if boundaries is not None:
            return Chunks.of(k, begins_of(boundaries, len(k), k.shape[2]), lengths, block)
        if self.predictor is not None:
            begins = self.predictor.begins(k, lengths, block, causal)
            return Chunks.of(k, begins, lengths, block, self.predictor.config.window if causal else 0)
        fixed = torch.arange(k.shape[2], device=k.device) % self.config.chunk_size == 0
        return Chunks.of(k, fixed.expand(len(k), -1), lengths, block)

    def choose(
        self, q: Tensor, k: Tensor, query_positions: Tensor | None, lengths: Tensor | None, boundaries: Begins | None = None
    ) -> BlockSelection:
        """The keys that each block reads, its own among them; for as many queries as keys."""
        chunks = self.chunks(k, lengths, query_positions is not None, boundaries)
        blocks = self._blocks(q, query_positions)
        index, valid = self.earlier(q, blocks, chunks, lengths if q.shape[2] == k.shape[2] else None)
        if query_positions is not None:
            own = blocks.home[:, None] * blocks.size + torch.arange(blocks.size, device=q.device)
            index = torch.cat((index, own.int().expand(*index.shape[:2], -1, -1)), -1)
            readable = (own < chunks.ends[:, None, None])[:, None].expand(-1, index.shape[1], -1, -1)
            valid = torch.cat((valid, readable), -1)
        return BlockSelection(index.masked_fill(~valid, 0), valid).sorted()

    def earlier(self, q: Tensor, blocks: QueryBlocks, chunks: Chunks, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """The keys before each block that it reads, int32 ``[B, G, Q, K]``, and bool, the same shape: which entries count.

        Args:
            q: ``[B, H, T, e]``.
            blocks: of these.
            chunks: of the keys.
            real: int64 ``[B]``, the queries that are no padding; None where all are.
        """
        query = self._block_queries(q, blocks, chunks, real)
        causal = blocks.offset is not None
        before = (
            torch.minimum(blocks.home * blocks.size, chunks.ends[:, None]) if causal else chunks.ends[:, None].expand(-1, len(blocks.home))
        )
        most = min(self.config.budget - (self.config.query_block if causal else 0), chunks.chunk.shape[1])
        parts = []
        for part in scored_slices(len(blocks.home), query.shape[1] * chunks.chunk.numel()):
            scores, tail = chunk_scores(query[:, :, part], chunks, before[:, part], self.config.per_key_head)
            keep = filled(scores, chunks, tail, before[:, part], most, self.config.n_global, self.config.n_local)
            parts.append(_places(keep, most))
        width = max(index.shape[-1] for index, _ in parts)
        index, valid = (torch.cat([F.pad(x[i], (0, width - x[i].shape[-1])) for x in parts], 2) for i in (0, 1))
        return index, valid

    def _blocks(self, q: Tensor, query_positions: Tensor | None) -> QueryBlocks:
        if query_positions is None:
            return QueryBlocks.placeless(q.shape[2], self.config.query_block, q.device)
        return QueryBlocks.aligned(query_positions, self.config.query_block)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_positions: Tensor | None,
        lengths: Tensor | None,
        scale: float | None,
        chunks: Chunks,
    ) -> Tensor:
        early, reach, last, parts = 0, 0, 0, []
        if query_positions is not None:
            size, last = self.config.query_block, int(query_positions[-1])
            reach = (self.config.budget - size) // size * size + size  # blocks up to there read all before them
            early, reach = int((query_positions < reach).sum()), min(reach, k.shape[2])
        if early:
            assert query_positions is not None
            shorter = lengths if lengths is not None and bool((lengths < reach).any()) else None
            first = (q[:, :, :early], k[:, :, :reach], v[:, :, :reach])
            parts.append(dense_attend(*first, query_positions=query_positions[:early], lengths=shorter, scale=scale))
        if early < q.shape[2]:
            late = q[:, :, early:]
            blocks = self._blocks(late, None if query_positions is None else query_positions[early:])
            with torch.no_grad():
                real = None if lengths is None or q.shape[2] != k.shape[2] else (lengths - early).clamp(min=0)
                index, valid = self.earlier(late, blocks, chunks, real)
            parts.append(attend_segments(late, k, v, blocks, index, valid, 1, last=last, lengths=lengths, scale=scale))
        found = torch.cat(parts, 2)
        if not self.config.instruction_tokens or q.shape[2] != k.shape[2]:
            return found
        return self._instructed(q, k, v, found, query_positions, chunks.ends, scale)

    def _block_queries(self, q: Tensor, blocks: QueryBlocks, chunks: Chunks, real: Tensor | None) -> Tensor:
        """float64 ``[B, H_kv, Q, e]``: each block's query, the heads of a key head added up."""
        if blocks.offset is not None and self.config.block_query == "first":
            query = blocks.first_queries(q).double()
        else:
            total, count = blocks.sums(q.double(), real)
            query = total / count.clamp(min=1).double().sqrt()
        batch, _, number, width = query.shape
        return query.reshape(batch, chunks.sums.shape[1], -1, number, width).sum(2)

    def _instructed(
        self, q: Tensor, k: Tensor, v: Tensor, found: Tensor, query_positions: Tensor | None, ends: Tensor, scale: float | None
    ) -> Tensor:
        """``found`` with dense attention in the place of each row's last queries."""
        count = min(self.config.instruction_tokens, q.shape[2])
        places = ends[:, None] - count + torch.arange(count, device=q.device)
        rows, slot = (places >= 0).nonzero(as_tuple=True)
        inside = places.clamp(min=0)
        last_q = q.gather(2, inside[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        place = torch.arange(k.shape[2], device=q.device)
        mask = place < ends[:, None, None]
        if query_positions is not None:
            mask = mask & (place <= query_positions[inside][..., None])
        mask = (mask | (ends == 0)[:, None, None])[:, None].expand(-1, -1, count, -1)
        dense = F.scaled_dot_product_attention(last_q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        at = (rows, inside[rows, slot])
        return found.transpose(1, 2).index_put(at, dense.transpose(1, 2)[rows, slot]).transpose(1, 2)


def chunk_scores(query: Tensor, chunks: Chunks, before: Tensor, per_key_head: bool) -> tuple[Tensor, Tensor]:
    """Scores of the chunks by the keys ``before`` each block, and the last chunk that each block knows, int64 ``[B, Q]``.

    Args:
        query: float64 ``[B, H_kv, Q, e]``.
        chunks: C of them.
        before: int64 ``[B, Q]``.
        per_key_head: whether heads are kept apart; their mean if not.

    Returns:
        float64 ``[B, G, Q, C]``, -inf for chunks behind the last known one, which counts with all tokens that came since.
    """
    tail = chunks.last_known(before)
    nexts = torch.minimum(F.pad(chunks.starts[:, 1:], (0, 1), value=chunks.chunk.shape[1]), chunks.ends[:, None])
    starts = torch.minimum(chunks.starts, chunks.ends[:, None])
    whole = query @ chunks.vectors(starts, nexts).transpose(2, 3)
    tail_start = torch.minimum(chunks.starts.gather(1, tail), before)
    part = (query * chunks.vectors(tail_start, before)).sum(-1, keepdim=True)
    number = torch.arange(chunks.starts.shape[1], device=query.device)
    scores = torch.where(number == tail[:, None, :, None], part, whole).masked_fill(number > tail[:, None, :, None], -torch.inf)
    return scores if per_key_head else scores.mean(1, keepdim=True), tail


def filled(scores: Tensor, chunks: Chunks, tail: Tensor, before: Tensor, most: int, n_global: int, n_local: int) -> Tensor:
    """bool ``[B, G, Q, N]``: the ``most`` keys ``before`` each block by the scores of their chunks, of equal ones the later.

    The first ``n_global`` and the last ``n_local`` come first. Chunks are taken whole in the order of their scores, and the one that no
    longer fits with its last tokens; that is top-k of the tokens' scores, without sorting tokens.
    """
    keys = chunks.chunk.shape[1]
    low, high = before.clamp(max=n_global), (before - n_local).clamp(min=0)
    ends = F.pad(chunks.starts[:, 1:], (0, 1), value=keys)[:, None].expand(-1, tail.shape[1], -1)
    number = torch.arange(ends.shape[-1], device=tail.device)
    ends = torch.where(number == tail[..., None], keys, ends)
    upper = torch.minimum(ends, high[..., None])
    size = (upper - torch.maximum(chunks.starts[:, None], low[..., None])).clamp(min=0)
    size = size.masked_fill(number > tail[..., None], 0)[:, None].expand_as(scores)
    left = (before.clamp(max=most) - (low + before - torch.maximum(high, low)))[:, None, :, None]
    order = len(number) - 1 - scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    ordered = size.gather(-1, order)
    room = left - (ordered.cumsum(-1) - ordered)
    taken = torch.empty_like(size).scatter(-1, order, torch.minimum(ordered, room.clamp(min=0)))
    begin = upper[:, None] - taken
    own = torch.minimum(chunks.chunk[:, None], tail[..., None])[:, None].expand(-1, scores.shape[1], -1, -1)
    place = torch.arange(keys, device=tail.device)
    forced = (place < low[..., None]) | (place >= high[..., None])
    return ((place >= begin.gather(-1, own)) | forced[:, None]) & (place < before[:, None, :, None])


def begins_of(boundaries: Begins, rows: int, keys: int) -> Tensor:
    """bool ``[B, N]``.

    Raises:
        DataError: the shapes do not fit, or a place lies outside of the keys.
    """
    if isinstance(boundaries, Tensor):
        if boundaries.dtype != torch.bool or boundaries.shape != (rows, keys):
            raise DataError(f"boundaries: expected bool [{rows}, {keys}], got {boundaries.dtype} {tuple(boundaries.shape)}")
        return boundaries
    places, offsets = boundaries
    if offsets.shape != (rows + 1,) or int(offsets[-1]) != len(places):
        raise DataError(f"boundaries: expected offsets [{rows + 1}] up to {len(places)}, got {tuple(offsets.shape)}")
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < keys:
        raise DataError(f"boundaries: expected places from 0 to {keys - 1}, got {int(places.min())} to {int(places.max())}")
    begins = torch.zeros(rows, keys, dtype=torch.bool, device=places.device)
    begins[row_of(offsets), places] = True
    return begins


def _prefix_sums(k: Tensor, piece: Tensor) -> Tensor:
    """float64 ``[B, H, P + 1, e]`` of ``[B, H, N, e]`` and the piece of each token, int64 ``[B, N]``."""
    (batch, heads, _, width), count = k.shape, int(piece.max()) + 1
    wide = k.to(torch.promote_types(k.dtype, torch.float32)).reshape(-1, width)
    first = torch.arange(batch * heads, device=k.device).view(batch, heads, 1) * count
    sums = wide.new_zeros(batch * heads * count, width).index_add(0, (first + piece[:, None]).flatten(), wide)
    return F.pad(sums.view(batch, heads, count, width).double().cumsum(2), (0, 0, 1, 0))


def _places(keep: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """A mask as ascending places int32 ``[…, K]`` and which of them count."""
    if bool((keep.sum(-1) == most).all()):
        index = keep.nonzero()[:, -1].view(*keep.shape[:-1], most).int()
        return index, torch.ones_like(index, dtype=torch.bool)
    chosen = BlockSelection.of_mask(keep)
    return chosen.index, chosen.valid
