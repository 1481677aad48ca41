# SPDX-License-Identifier: Apache-2.0
"""TokenSelect: the heads of a layer vote which keys all of them read; similar queries in a row share one choice."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kernels.paged_scores import paged_scores
from recsys.core.components import register
from recsys.core.errors import ConfigError
from recsys.efficiency.attend import gather_keys, masked_attend, sparse_attend
from recsys.efficiency.attention.base import SelectedAttention, SparseAttentionConfig
from recsys.efficiency.selection import BlockSelection
from recsys.efficiency.selectors import top_keys

Rotate = Callable[[Tensor, Tensor], Tensor]


class SelectionCache:
    """What each row of a batch chose last while decoding, and for which query. One for each layer and batch.

    A row chooses anew where its query is less similar to the cached one than ``theta``, where ``refresh`` keys have come since (what has
    left the local window meanwhile cannot be read before), or where its history has become shorter.

    Attributes:
        recomputed: int64 ``[B]``, how often each row chose.
    """

    def __init__(self) -> None:
        self.recomputed: Tensor | None = None
        self._query: Tensor
        self._end: Tensor
        self._chosen: BlockSelection

    def due(self, query: Tensor, end: Tensor, theta: float, refresh: int) -> Tensor:
        """bool ``[B]``: the rows that must choose, given queries ``[B, H, e]`` and the ends int64 ``[B]`` of what stands before them.

        Raises:
            ConfigError: the cache is of another number of rows.
        """
        if self.recomputed is None:
            return torch.ones(len(query), dtype=torch.bool, device=query.device)
        if len(self.recomputed) != len(query):
            raise ConfigError(f"cache: expected one of {len(query)} rows, got one of {len(self.recomputed)}")
        cosine = F.cosine_similarity(query.flatten(1), self._query.flatten(1), dim=-1).clamp(-1.0, 1.0)
        since = end - self._end
        return (cosine < theta) | (since >= refresh) | (since < 0)

    def store(self, due: Tensor, query: Tensor, end: Tensor, chosen: BlockSelection) -> None:
        """Remember what the ``due`` rows chose, ``[due rows, 1, 1, K]`` with the same K every time."""
        if self.recomputed is None:
            self.recomputed, self._query, self._end, self._chosen = due.long(), query, end, chosen
            return
        index, valid = self._chosen.index.clone(), self._chosen.valid.clone()
        index[due], valid[due] = chosen.index, chosen.valid
        self._chosen = BlockSelection(index, valid)
        self._query = torch.where(due[:, None, None], query, self._query)
        self._end = torch.where(due, end, self._end)
        self.recomputed = self.recomputed + due

    def chosen(self) -> BlockSelection:
        """The choice of all rows, ``[B, 1, 1, K]``."""
        return self._chosen

    def reorder(self, rows: Tensor) -> None:
        """Take over what the rows int64 ``[B']`` remember, as beams do from their parents."""
        if self.recomputed is not None:
            self.recomputed, self._query, self._end = self.recomputed[rows], self._query[rows], self._end[rows]
            self._chosen = BlockSelection(self._chosen.index[rows], self._chosen.valid[rows])


@dataclass(frozen=True)
class _Chunk:
    """Adjacent queries that share a choice.

    Attributes:
        part: which queries.
        positions: int64 ``[C]``, or None.
        end: int64 ``[B]``, where what stands before the chunk ends; the keys from there to the last query are the chunk's own.
        own: int64 ``[W]``, places of the chunk's own keys.
        length: int64 ``[B]``, keys of each row.
        queries: of the whole call.
    """

    part: slice
    positions: Tensor | None
    end: Tensor
    own: Tensor
    length: Tensor
    queries: int


@register("sparse_attention", "token_select")
class TokenSelectAttention(SelectedAttention):
    """TokenSelect: the first and the last keys, the chunk's own ones, and the ``keep`` keys between them that the heads vote for.

    A chunk of C adjacent queries reads one set of keys for all heads: ``vote_j = Σ_h softmax_j(q̄_h · k_{g(h), j})`` over the middle region
    ``[n_init, start - n_local)``, in single precision at least. Each head has one vote of mass 1, so that a head with long vectors does not
    outvote the others. The chunk's own keys are read under the causal mask. If everything fits into the budgets this is dense attention.

    The paper's q̄ is the mean of the chunk's queries: a query's keys are then chosen by later queries too, which suits a prompt that is
    known as a whole but not the training or scoring of a sequence. ``representative: mean`` is that; the default, ``first``, takes the
    chunk's first query and leaks nothing. While decoding both are the same. Queries without positions are no sequence: their mean chooses.

    A `SelectionCache` lets similar queries in a row (cosine over all heads at least ``theta``) share a choice while decoding; the local
    window moves on. The paper does not bound a choice's age: here it is ``refresh`` keys at most, n_local if not said.

    The paper's inner products in the softmax are not scaled, which is peaky: see ``vote_scale``. Its defaults are n_init = 128,
    n_local = 512, k = 2048 and C = 512; these are for histories of some thousand events.
    """

    class Config(SparseAttentionConfig):
        """The budgets.

        Attributes:
            keep: k, keys that are chosen from the middle.
            initial: n_init, first keys that are always read.
            local: n_local, keys in front of the chunk that are always read.
            chunk: C, queries that share a choice.
            representative: which query chooses for its chunk.
            vote_scale: factor of the inner products in the vote.
            smoothing: width of the maximum over adjacent votes, odd; 1 is none.
            theta: least cosine with the cached query for which its choice is used again.
            refresh: keys after which a cached choice is not used again; None for ``local``.
        """

        name: Literal["token_select"] = "token_select"
        keep: int = Field(256, ge=1)
        initial: int = Field(16, ge=0)
        local: int = Field(64, ge=0)
        chunk: int = Field(64, ge=1)
        representative: Literal["first", "mean"] = "first"
        vote_scale: float = Field(1.0, gt=0.0)
        smoothing: int = Field(1, ge=1)
        theta: float = 0.9
        refresh: int | None = Field(None, ge=1)

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.smoothing % 2 == 0:
            raise ConfigError(f"sparse_attention 'token_select': smoothing: expected an odd number, got {config.smoothing}")
        self.config: TokenSelectAttention.Config = config

    @property
    def causal(self) -> bool:
        """See `SparseAttention.causal`."""
        return self.config.representative == "first"

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_positions: Tensor | None,
        lengths: Tensor | None,
        scale: float | None,
        cache: SelectionCache | None = None,
    ) -> Tensor:
        """See `SparseAttention.attend`.

        Args:
            q: as there.
            k: as there.
            v: as there.
            query_positions: as there.
            lengths: as there.
            scale: as there.
            cache: of this layer, while decoding one query at a time.

        Raises:
            ConfigError: a cache and more than one query.
        """
        parts = [q.new_zeros(*q.shape[:2], 0, v.shape[-1])]
        for chunk in self._chunks(q, k, query_positions, lengths, cache):
            queries = q[:, :, chunk.part]
            with torch.no_grad():
                selection = self._choose(queries, k, chunk, self.config.keep, cache)
            parts.append(sparse_attend(queries, k, v, selection, query_positions=chunk.positions, scale=scale))
        return torch.cat(parts, 2)

    def extrapolate(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotate: Rotate,
        *,
        query_positions: Tensor,
        lengths: Tensor | None = None,
        scale: float | None = None,
        cache: SelectionCache | None = None,
    ) -> Tensor:
        """Attention beyond the length that a model was trained for: what is read gets the positions 0, 1, … of its own.

        Queries and keys come *without* rotation. The vote rotates the queries to n_local and leaves the keys at 0, so that every key is
        judged as if it stood at the edge of the window. In the attention the |I| keys read stand at 0 to |I| - 1 in their order, and a
        query at the place of its own key among them. For histories within the trained length rotate first and use `forward`.

        Args:
            q: see `forward`, not rotated.
            k: see `forward`, not rotated.
            v: see `forward`.
            rotate: ``rotate(x [B, H, n, e], positions int64 [B or 1, n])``, the model's rotary embedding.
            query_positions: see `forward`; needed here.
            lengths: see `forward`.
            scale: see `forward`.
            cache: see `forward`.

        Raises:
            ConfigError: a cache and more than one query.
        """
        keep, cache = (k.shape[2], None) if k.shape[2] <= self.config.min_length else (self.config.keep, cache)
        judged = rotate(q, torch.full((1, q.shape[2]), self.config.local, device=q.device))
        parts = [q.new_zeros(*q.shape[:2], 0, v.shape[-1])]
        for chunk in self._chunks(q, k, query_positions, lengths, cache):
            with torch.no_grad():
                selection = self._choose(judged[:, :, chunk.part], k, chunk, keep, cache)
            parts.append(_attend_compact(q[:, :, chunk.part], k, v, selection, query_positions[chunk.part], rotate, scale))
        return torch.cat(parts, 2)

    def choose(self, q: Tensor, k: Tensor, query_positions: Tensor | None, lengths: Tensor | None) -> BlockSelection:
        """See `SelectedAttention.choose`: ``[B, 1, 1, K]`` for the queries of one chunk.

        Raises:
            ConfigError: more queries than one chunk holds.
        """
        if not 1 <= q.shape[2] <= self.config.chunk:
            raise ConfigError(f"choose: expected the 1 to {self.config.chunk} queries of one chunk, got {q.shape[2]}")
        (chunk,) = self._chunks(q, k, query_positions, lengths, None)
        return self._choose(q, k, chunk, self.config.keep, None)

    def _chunks(
        self, q: Tensor, k: Tensor, query_positions: Tensor | None, lengths: Tensor | None, cache: SelectionCache | None
    ) -> Iterator[_Chunk]:
        if cache is not None and q.shape[2] != 1:
            raise ConfigError(f"cache: expected one query (it is for decoding), got {q.shape[2]}")
        length = torch.full((len(q),), k.shape[2], device=q.device) if lengths is None else lengths
        for begin in range(0, q.shape[2], self.config.chunk):
            part = slice(begin, min(begin + self.config.chunk, q.shape[2]))
            if query_positions is None:
                yield _Chunk(part, None, length, length.new_zeros(0), length, q.shape[2])
                continue
            positions = query_positions[part]
            first, last = int(positions[0]), min(int(positions[-1]), k.shape[2] - 1)
            yield _Chunk(part, positions, length.clamp(max=first), torch.arange(first, last + 1, device=q.device), length, q.shape[2])

    def _choose(self, q: Tensor, k: Tensor, chunk: _Chunk, keep: int, cache: SelectionCache | None) -> BlockSelection:
        """The keys that a chunk reads, ascending."""
        mean = chunk.positions is None or self.config.representative == "mean"
        query = self._mean(q, k, chunk) if mean else q[:, :, 0]
        middle = self._middle(query, k, chunk.end, keep) if cache is None else self._cached(query, k, chunk.end, keep, cache)
        first = torch.arange(min(self.config.initial, k.shape[2]), device=q.device).expand(len(q), -1)
        local = chunk.end[:, None] - self.config.local + torch.arange(self.config.local, device=q.device)
        own = chunk.own.expand(len(q), -1)
        valid = (first < chunk.end[:, None], middle.valid[:, 0, 0], local >= self.config.initial, own < chunk.length[:, None])
        index = torch.cat((first, middle.index[:, 0, 0], local, own), 1)
        return BlockSelection(index.int()[:, None, None], torch.cat(valid, 1)[:, None, None]).sorted()

    @staticmethod
    def _mean(q: Tensor, k: Tensor, chunk: _Chunk) -> Tensor:
        """``[B, H, e]``: the mean of a chunk's queries; those at places that a row does not have are padding, where queries have places."""
        places = chunk.positions
        if places is None and chunk.queries == k.shape[2]:
            places = torch.arange(chunk.part.start, chunk.part.stop, device=q.device)
        if places is None:
            return q.mean(2)
        real = (places < chunk.length[:, None]).to(q.dtype)
        return torch.einsum("bhce,bc->bhe", q, real) / real.sum(1).clamp(min=1)[:, None, None]

    def _middle(self, query: Tensor, k: Tensor, end: Tensor, keep: int) -> BlockSelection:
        """What the heads vote for between the first and the last keys, ``[B, 1, 1, keep]``."""
        begin = self.config.initial
        stop = max(int(end.max()) - self.config.local if len(end) else 0, begin)
        inside = torch.arange(begin, stop, device=k.device) < (end - self.config.local)[:, None]
        votes = head_vote(head_logits(query, k[:, :, begin:stop]), inside, self.config.vote_scale, self.config.smoothing)
        found = top_keys(votes[:, None, None], keep, inside[:, None, None])
        fill = keep - found.index.shape[-1]
        return BlockSelection(F.pad(found.index + begin, (0, fill)), F.pad(found.valid, (0, fill)))

    def _cached(self, query: Tensor, k: Tensor, end: Tensor, keep: int, cache: SelectionCache) -> BlockSelection:
        """`_middle` for the rows that have nothing to use again."""
        due = cache.due(query, end, self.config.theta, self.config.refresh or max(self.config.local, 1))
        if bool(due.all()):
            cache.store(due, query, end, self._middle(query, k, end, keep))
        elif bool(due.any()):
            cache.store(due, query, end, self._middle(query[due], k[due], end[due], keep))
        return cache.chosen()


def head_logits(query: Tensor, k: Tensor) -> Tensor:
    """``q_h · k_{g(h), j}``, ``[B, H, n]``, of one query ``[B, H, e]`` of each row and keys ``[B, H_kv, n, e]``: g(h) = h H_kv // H."""
    logits: Tensor = (query.unflatten(1, (k.shape[1], -1)) @ k.transpose(-1, -2)).flatten(1, 2)
    return logits


def head_vote(logits: Tensor, inside: Tensor, scale: float = 1.0, smoothing: int = 1) -> Tensor:
    """The soft vote of the heads, ``[B, n]``: ``Σ_h softmax_j(scale · logits)``, which sums to H before any smoothing.

    Args:
        logits: ``[B, H, n]``; taken to single precision if they have less, where votes of many keys would vanish.
        inside: bool ``[B, n]``, the keys that stand for election; the others get 0.
        scale: of the logits.
        smoothing: width of the maximum over adjacent votes, odd.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    lowest = torch.finfo(exact.dtype).min
    votes = exact.masked_fill(~inside[:, None], lowest).softmax(-1).masked_fill(~inside[:, None], 0.0).sum(1)
    if smoothing > 1 and votes.numel():
        votes = F.max_pool1d(votes[:, None], smoothing, 1, smoothing // 2)[:, 0].masked_fill(~inside, 0.0)
    return votes


def paged_dot(q: Tensor, pages: Tensor, slots: Tensor) -> Tensor:
    """`head_logits` of keys that lie scattered in a pool, ``[B, H, n]``, without a contiguous copy of them all and without a gradient.

    Key head ``h // (H / H_kv)`` serves query head h. The released kernel takes ``h % H_kv``, which is another assignment.

    Args:
        q: ``[B, H, e]``.
        pages: ``[slots, H_kv, e]``, pages of one key; H_kv divides H.
        slots: int64 ``[B, n]``, where each row's keys lie; -1 for none, which scores -inf.
    """
    offsets = slots.shape[1] * torch.arange(len(q) + 1, device=q.device)
    scores_hs = paged_scores(q, pages, slots.flatten(), offsets, q.dtype)
    scores_bhn: Tensor = scores_hs.unflatten(1, slots.shape).transpose(0, 1)
    return scores_bhn


def _attend_compact(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, positions: Tensor, rotate: Rotate, scale: float | None
) -> Tensor:
    """Attention of ``[B, H, C, e]`` to a selection ``[B, 1, 1, K]`` in ascending order, with positions counted among what is read."""
    place, kept = selection.index[:, 0, 0], selection.index.shape[-1]
    mask = selection.valid[:, 0] & (place[:, None] <= positions[:, None])
    at = (mask.sum(-1) - 1).clamp(min=0)
    keys, values = (gather_keys(x, selection.index)[:, :, 0] for x in (k, v))
    keys, q = rotate(keys, torch.arange(kept, device=k.device)[None]), rotate(q, at)
    return masked_attend(q, keys, values, mask[:, None], scale)
