# SPDX-License-Identifier: Apache-2.0
"""DeepSeek sparse attention (DSA) with its flat indexer, and HISA, the hierarchical indexer in its place."""

from collections.abc import Iterator
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from recsys.core.components import register
from recsys.core.errors import ConfigError
from recsys.efficiency.attend import gather_keys, sparse_attend
from recsys.efficiency.attention.base import SelectedAttention, SparseAttentionConfig
from recsys.efficiency.attention.indexer import BlockMeans, IndexInputs, index_scores
from recsys.efficiency.scoring import PairScorer
from recsys.efficiency.selection import BlockSelection
from recsys.efficiency.selectors import top_recent


class FlatIndexer(PairScorer):
    """DSA's lightning indexer: the k keys with the highest ``I_{t,s} = Σ_j w_{t,j} relu(q_{t,j} · k_s)`` among those readable at t.

    Exactly ``min(k, t)`` keys for each query that may read t, in ascending order; of equal scores the later. Queries are taken ``chunk``
    at a time, so that no more than ``chunk`` × N scores stand in memory for each row and index head.

    Args:
        keep: k.
        chunk: queries that are scored at once.
    """

    def __init__(self, keep: int, chunk: int = 64) -> None:
        super().__init__()
        if keep < 1 or chunk < 1:
            raise ConfigError(f"indexer: keep, chunk: expected at least 1, got {keep} and {chunk}")
        self.keep, self.chunk = keep, chunk

    def score(self, q: Tensor, k: Tensor, gates: Tensor | None = None) -> Tensor:
        """I, ``[B, 1, T, N]``, of all pairs; for the shapes see `IndexInputs`."""
        return index_scores(q[:, :, None], k[:, :, None], None if gates is None else gates[:, :, None])

    def scored_keys(self, length: int) -> int:
        """Keys and block means that are scored for one query that may read ``length`` keys."""
        return length

    def choose(self, index: IndexInputs, *, query_positions: Tensor | None = None, lengths: Tensor | None = None) -> BlockSelection:
        """What each query reads, ``[B, 1, T, min(k, N)]``; for long inputs see `chunks`, which never holds all of it.

        Args:
            index: index queries, keys and gates.
            query_positions: int64 ``[T]``, ascending; None where every query reads all keys.
            lengths: int64 ``[B]``, the keys of each row; None where all have N.
        """
        (batch, _, queries, _), kept = index.q.shape, min(self.keep, index.k.shape[2])
        places = torch.zeros(batch, 1, queries, kept, dtype=torch.int32, device=index.q.device)
        valid = torch.zeros_like(places, dtype=torch.bool)
        for part, found in self.chunks(index, query_positions, lengths):
            width = found.index.shape[-1]
            places[:, :, part, :width], valid[:, :, part, :width] = found.index, found.valid
        return BlockSelection(places, valid)

    @torch.no_grad()
    def chunks(self, index: IndexInputs, query_positions: Tensor | None, lengths: Tensor | None) -> Iterator[tuple[slice, BlockSelection]]:
        """Parts of the queries, each with what its queries read, ``[B, 1, chunk, K ≤ k]``, without gradients; arguments as of `choose`."""
        index = self.prepared(index)
        last_bt = last_places(index, query_positions, lengths)
        for begin in range(0, index.q.shape[2] if len(index.q) else 0, self.chunk):
            part = slice(begin, min(begin + self.chunk, index.q.shape[2]))
            yield part, self.choose_chunk(index.queries(part), last_bt[:, part], query_positions is not None)

    def prepared(self, index: IndexInputs) -> IndexInputs:
        """What is computed once for all chunks."""
        return index

    def choose_chunk(self, index: IndexInputs, last_bt: Tensor, causal: bool) -> BlockSelection:
        """`chunks` for one chunk.

        Args:
            index: with the queries of the chunk.
            last_bt: int64 ``[B, T]``, the last place that each query may read; -1 for none.
            causal: the queries are a sequence, none of which may know of a later one.
        """
        reach = int(last_bt.max()) + 1
        scores = self.score(index.q, index.k[:, :, :reach], index.gates)
        behind = torch.arange(reach, device=scores.device) > last_bt[:, None, :, None]
        return top_recent(scores.masked_fill(behind, -torch.inf), self.keep)


class HisaIndexer(FlatIndexer):
    """HISA: block means first, then `FlatIndexer`'s scores inside the m blocks that survive.

    ``J_{t,b} = Σ_j w_{t,j} relu(q_{t,j} · mean of block b's keys)``; the first block and the query's own one always survive, and those two
    are counted among the m. A query that may read at most m B keys gets what the flat indexer gives, at the flat indexer's cost. Since
    gates may be negative, J bounds nothing: it is a heuristic.

    The paper does not say how the own block, which is not complete, gets its mean. Here it gets none: only complete blocks in front of the
    own one are scored, hence no mean holds a key that the query may not read. The paper fixes blocks by place; sessions would have to be
    padded to blocks by the caller.

    With ``query_block`` R above 1 the candidate blocks of R adjacent queries are those of the *first* of them, together with the own blocks
    of all; the candidates' keys are gathered once for R queries, and no query knows of a later one. Each query still chooses its own keys.
    The paper shares nothing. Queries without positions are no sequence and share nothing either.

    Args:
        keep: k.
        block: B, keys of a block.
        blocks: m, blocks that survive; m B must be at least k.
        query_block: R, adjacent queries that share candidate blocks.
        chunk: queries that are scored at once; rounded up to whole query blocks.
    """

    def __init__(self, keep: int, block: int, blocks: int, query_block: int = 1, chunk: int = 64) -> None:
        super().__init__(keep, chunk)
        if block < 1 or blocks < 2 or query_block < 1:
            raise ConfigError(
                f"indexer: expected block of at least 1, blocks of at least 2 (the first and the own one) and query_block of at least 1, "
                f"got {block}, {blocks} and {query_block}"
            )
        if blocks * block < keep:
            raise ConfigError(f"indexer: expected blocks x block of at least keep, got {blocks} x {block} < {keep}")
        self.block, self.blocks, self.query_block = block, blocks, query_block
        self.chunk = -(-chunk // query_block) * query_block

    def scored_keys(self, length: int) -> int:
        """See `FlatIndexer.scored_keys`."""
        budget = self.block * self.blocks
        return length if length <= budget else -(-length // self.block) + budget

    def prepared(self, index: IndexInputs) -> IndexInputs:
        """With the means of the keys' blocks.

        Raises:
            ConfigError: the means that were given are of blocks of another size.
        """
        if index.means is not None and index.means.size != self.block:
            raise ConfigError(f"index: means: expected those of blocks of {self.block} keys, got {index.means.size}")
        if index.means is not None or index.k.shape[2] <= self.block * self.blocks:
            return index
        return IndexInputs(index.q, index.k, index.gates, BlockMeans.of(index.k, self.block))

    def choose_chunk(self, index: IndexInputs, last_bt: Tensor, causal: bool) -> BlockSelection:
        """See `FlatIndexer.choose_chunk`."""
        if int(last_bt.max()) < self.block * self.blocks:
            return super().choose_chunk(index, last_bt, causal)
        queries, size = last_bt.shape[1], min(self.query_block, last_bt.shape[1]) if causal else 1
        fill = -queries % size
        q_bhqrd = F.pad(index.q, (0, 0, 0, fill)).unflatten(2, (-1, size))
        gates_bhqr = None if index.gates is None else F.pad(index.gates, (0, fill)).unflatten(2, (-1, size))
        last_bqr = F.pad(last_bt, (0, fill), value=-1).unflatten(1, (-1, size))
        candidates = self._candidates(q_bhqrd, gates_bhqr, cast(BlockMeans, index.means).means, last_bqr)
        places = candidates.index[..., None] * self.block + torch.arange(self.block, dtype=torch.int32, device=last_bt.device)
        places_b1qp, held_bqp = places.flatten(3), candidates.valid[:, 0].repeat_interleave(self.block, -1)
        keys_bgqpd = gather_keys(index.k, places_b1qp.clamp(max=index.k.shape[2] - 1))
        scores_bqrp = index_scores(q_bhqrd, keys_bgqpd, gates_bhqr)
        readable = held_bqp[:, :, None] & (places_b1qp[:, 0, :, None] <= last_bqr[..., None])
        found = top_recent(scores_bqrp.masked_fill(~readable, -torch.inf).flatten(1, 2)[:, None], self.keep)
        chosen = places_b1qp.repeat_interleave(size, 2).gather(-1, found.index.long())
        return BlockSelection(chosen[:, :, :queries].masked_fill(~found.valid[:, :, :queries], 0), found.valid[:, :, :queries])

    def candidates(self, index: IndexInputs, query_positions: Tensor | None, lengths: Tensor | None = None) -> BlockSelection:
        """The blocks in which each query block looks, ``[B, 1, Q, C]``, for queries that form whole query blocks.

        For inspection: it takes all queries at once. For the arguments see `choose`.
        """
        last_bt = last_places(index, query_positions, lengths)
        size = 1 if query_positions is None else self.query_block
        means = index.means if index.means is not None else BlockMeans.of(index.k, self.block)
        gates = None if index.gates is None else index.gates.unflatten(2, (-1, size))
        return self._candidates(index.q.unflatten(2, (-1, size)), gates, means.means, last_bt.unflatten(1, (-1, size)))

    def _candidates(self, q_bhqrd: Tensor, gates_bhqr: Tensor | None, means_bgmd: Tensor, last_bqr: Tensor) -> BlockSelection:
        """The first block, the m - 2 best complete ones and the own ones: each once, in ascending order."""
        own = last_bqr[..., 0].div(self.block, rounding_mode="floor")[:, None, :, None]
        end = last_bqr.amax(-1).div(self.block, rounding_mode="floor")[:, None, :, None]
        past = max(int(own.max()), 0)
        leader, weights = q_bhqrd[..., 0, :], None if gates_bhqr is None else gates_bhqr[:, :, None, :, 0]
        scores = index_scores(leader[:, :, None], means_bgmd[:, :, None, :past], weights)
        place = torch.arange(past, device=scores.device)
        best = top_recent(scores.masked_fill(~((place > 0) & (place < own)), -torch.inf), self.blocks - 2)
        owned = own + torch.arange(int((end - own).max()) + 1, device=scores.device)
        index = torch.cat((torch.zeros_like(own), best.index, owned), -1)
        valid = torch.cat((own > 0, best.valid, (owned <= end) & (own >= 0)), -1)
        return BlockSelection(index.int(), valid).sorted()


class IndexedAttention(SelectedAttention):
    """Exact attention to what an indexer chose: one choice for all heads, and for each query its own."""

    indexer: FlatIndexer

    def choose(self, q: Tensor, k: Tensor, query_positions: Tensor | None, lengths: Tensor | None) -> BlockSelection:
        """See `SelectedAttention.choose`: ``[B, 1, T, min(k, N)]``."""
        return self.indexer.choose(IndexInputs(q, k), query_positions=query_positions, lengths=lengths)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_positions: Tensor | None,
        lengths: Tensor | None,
        scale: float | None,
        index: IndexInputs | None = None,
    ) -> Tensor:
        """See `SparseAttention.attend`; chunk by chunk, so that neither the choice nor the keys of all queries stand in memory at once.

        Args:
            q: as there.
            k: as there.
            v: as there.
            query_positions: as there.
            lengths: as there.
            scale: as there.
            index: what a trained indexer says of the same T queries and N keys (`IndexerProjection`), with the block means where these are
                kept while decoding. None has the model's own queries and keys serve, without any training: ``q`` as index queries and ``k``
                as index keys, each key head for its group of query heads, all gates 1.

        Raises:
            ConfigError: the index is of other queries or keys.
        """
        index = IndexInputs(q, k) if index is None else index
        if (index.q.shape[0], index.q.shape[2], index.k.shape[2]) != (q.shape[0], q.shape[2], k.shape[2]):
            raise ConfigError(
                f"index: expected that of {q.shape[0]} rows, {q.shape[2]} queries and {k.shape[2]} keys, "
                f"got q {tuple(index.q.shape)} and k {tuple(index.k.shape)}"
            )
        chunks = self.indexer.chunks(index, query_positions, lengths)
        parts = [sparse_attend(q[:, :, part], k, v, selection, scale=scale) for part, selection in chunks]
        return torch.cat(parts, 2) if parts else q.new_zeros(*q.shape[:3], v.shape[-1])


@register("sparse_attention", "dsa")
class DsaAttention(IndexedAttention):
    """DeepSeek sparse attention with its flat indexer: each query reads the k keys that the indexer scores highest.

    DeepSeek trains the indexer; hand its result on as ``index``. Without one this is training-free, with the model's own
    queries and keys as index, which is ours. The defaults are for histories of some thousand events; DeepSeek keeps 2048.
    """

    class Config(SparseAttentionConfig):
        """The budget.

        Attributes:
            keep: k.
            chunk: queries that are taken at once.
        """

        name: Literal["dsa"] = "dsa"
        keep: int = Field(256, ge=1)
        chunk: int = Field(64, ge=1)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config: DsaAttention.Config = config
        self.indexer = FlatIndexer(config.keep, config.chunk)


@register("sparse_attention", "hisa")
class HisaAttention(IndexedAttention):
    """DSA with the hierarchical indexer (HISA): see `HisaIndexer`, and `DsaAttention` for what serves as index without a trained one.

    The paper's defaults are B = 128, m = 64 and k = 2048; these are for histories of some thousand events.
    """

    class Config(SparseAttentionConfig):
        """The budgets.

        Attributes:
            keep: k.
            block: B, keys of a block.
            blocks: m, blocks whose keys are scored; m B must be at least k.
            query_block: adjacent queries that share candidate blocks.
            chunk: queries that are taken at once.
        """

        name: Literal["hisa"] = "hisa"
        keep: int = Field(256, ge=1)
        block: int = Field(32, ge=1)
        blocks: int = Field(32, ge=2)
        query_block: int = Field(1, ge=1)
        chunk: int = Field(64, ge=1)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config: HisaAttention.Config = config
        self.indexer = HisaIndexer(config.keep, config.block, config.blocks, config.query_block, config.chunk)


def last_places(index: IndexInputs, query_positions: Tensor | None, lengths: Tensor | None) -> Tensor:
    """int64 ``[B, T]``: the last place that each query may read; -1 for none."""
    (batch, _, queries, _), keys = index.q.shape, index.k.shape[2]
    last = torch.full((batch, queries), keys - 1, device=index.q.device)
    if query_positions is not None:
        last = torch.minimum(last, query_positions)
    return last if lengths is None else torch.minimum(last, lengths[:, None] - 1)
