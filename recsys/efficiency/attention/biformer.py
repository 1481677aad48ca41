# SPDX-License-Identifier: Apache-2.0
"""BiFormer's bi-level routing attention over regions of a sequence."""

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.errors import ConfigError
from recsys.efficiency.attend import dense_attend
from recsys.efficiency.attention.base import SelectedAttention, SparseAttentionConfig
from recsys.efficiency.attention.blocks import QueryBlocks, attend_segments
from recsys.efficiency.selection import BlockSelection
from recsys.efficiency.selectors import top_recent

_REGION_SIZE = 64


@dataclass(frozen=True)
class Routes:
    """The regions that each region of queries reads, besides its own in the causal form; ``[B, G, Q, S]`` each.

    Attributes:
        index: int64, ascending.
        valid: bool, which entries count.
        weights: float, the softmax of the routing scores over what is read; None for hard routing.
    """

    index: Tensor
    valid: Tensor
    weights: Tensor | None


@register("sparse_attention", "biformer")
class BiFormerAttention(SelectedAttention):
    """Regions choose regions by the product of their means, then tokens read tokens (BiFormer, §8 of the specification).

    The paper's form is two-dimensional and reads in both directions; here regions are adjacent tokens of a sequence. Without
    ``query_positions`` it is the paper's: each region of queries reads the ``top_k`` best regions of keys, all their tokens.

    The paper has no causal form. Here a region of queries reads its own region in any case, under a causal mask, and the best
    ``top_k - 1`` regions before it, whole and without a mask. Its own region is never scored (its mean holds later keys), and the query
    of a region is its *first* query, not the mean, which would let a later query choose what an earlier one reads. A call that begins
    inside a region, as decoding does, routes by its own first query. The first ``top_k`` regions read all before them: dense attention.

    The inner products are scaled by the head's width unless the caller says otherwise; the release takes the width of all heads, which
    here scales the routing scores only (it matters for soft routing alone). Hard routing passes no gradient to queries and keys. In soft
    routing keys and values of a region are multiplied by its weight, as in the release; in the causal form the softmax is over the chosen
    regions before the own one, whose weight is 1.

    The local enhancement adds a depthwise convolution of the values; with ``query_positions`` it reads a value and those before it.
    """

    class Config(SparseAttentionConfig):
        """The regions.

        Attributes:
            region_size: tokens of a region; 64 where ``regions`` is not given either.
            regions: their number, in the place of a size. The size then follows from the width of the padded rows, so that calls with
                ``lengths`` are refused: a row's result would depend on its batch mates.
            top_k: regions that are read, in the causal form with the own one.
            first_region: whether the causal form reads the first region in any case.
            per_key_head: whether each key head chooses for itself, not all together.
            soft_routing: see the class.
            local_kernel: width of the local enhancement's convolution; 0 for none.
            local_channels: H_kv e_v, the channels that it has; required with it.
        """

        name: Literal["biformer"] = "biformer"
        region_size: int | None = Field(None, ge=1)
        regions: int | None = Field(None, ge=1)
        top_k: int = Field(8, ge=1)
        first_region: bool = False
        per_key_head: bool = False
        soft_routing: bool = False
        local_kernel: int = Field(0, ge=0)
        local_channels: int | None = Field(None, ge=1)

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            if self.region_size is not None and self.regions is not None:
                raise ValueError(f"regions: expected either regions or region_size, got {self.regions} and {self.region_size}")
            if self.first_region and self.top_k < 2:
                raise ValueError(f"top_k: expected at least 2, the first region and the own one, got {self.top_k}")
            if (self.local_kernel > 0) != (self.local_channels is not None):
                raise ValueError(f"local_channels: expected them exactly where there is a local_kernel, got {self.local_channels!r}")
            if self.local_kernel and self.local_kernel % 2 == 0:
                raise ValueError(f"local_kernel: expected an odd number or 0, got {self.local_kernel}")
            return self

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.local: nn.Conv1d | None = None
        if config.local_channels is not None:
            self.local = nn.Conv1d(config.local_channels, config.local_channels, config.local_kernel, groups=config.local_channels)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        query_positions: Tensor | None = None,
        lengths: Tensor | None = None,
        scale: float | None = None,
        **told: Any,
    ) -> Tensor:
        """See `SparseAttention.forward`; the local enhancement is added to dense attention too."""
        found = super().forward(q, k, v, query_positions=query_positions, lengths=lengths, scale=scale, **told)
        return found if self.local is None else found + self._enhanced(q, v, query_positions, lengths)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None, lengths: Tensor | None, scale: float | None
    ) -> Tensor:
        """See `SparseAttention.attend`."""
        if not q.shape[2]:
            return q.new_zeros(*q.shape[:3], v.shape[-1])
        size = self._size(k.shape[2], lengths)
        if query_positions is None:
            routes, blocks = self.route(q, k, None, lengths), QueryBlocks.placeless(q.shape[2], size, q.device)
            return attend_segments(q, k, v, blocks, routes.index, routes.valid, size, lengths=lengths, scale=scale, weights=routes.weights)
        early = 0 if self.config.soft_routing else int((query_positions < self.config.top_k * size).sum())
        parts = []
        if early:
            reach = min(self.config.top_k * size, k.shape[2])
            shorter = lengths if lengths is not None and bool((lengths < reach).any()) else None
            parts.append(
                dense_attend(
                    q[:, :, :early],
                    k[:, :, :reach],
                    v[:, :, :reach],
                    query_positions=query_positions[:early],
                    lengths=shorter,
                    scale=scale,
                )
            )
        if early < q.shape[2]:
            late, positions = q[:, :, early:], query_positions[early:]
            routes, blocks = self.route(late, k, positions, lengths), QueryBlocks.aligned(positions, size)
            last = int(positions[-1])
            parts.append(
                attend_segments(
                    late, k, v, blocks, routes.index, routes.valid, size, last=last, lengths=lengths, scale=scale, weights=routes.weights
                )
            )
        return torch.cat(parts, 2)

    def choose(self, q: Tensor, k: Tensor, query_positions: Tensor | None, lengths: Tensor | None) -> BlockSelection:
        """The keys of the regions that each region of queries reads, its own among them; for as many queries as keys."""
        size, keys = self._size(k.shape[2], lengths), k.shape[2]
        routes = self.route(q, k, query_positions, lengths)
        index, valid = routes.index, routes.valid
        if query_positions is not None:
            own = QueryBlocks.aligned(query_positions, size).home.view(1, 1, -1, 1).expand(*index.shape[:3], 1)
            index, valid = torch.cat((index, own), -1), F.pad(valid, (0, 1), value=True)
        places = (index[..., None] * size + torch.arange(size, device=q.device)).flatten(3)
        limit = keys if lengths is None else lengths.clamp(max=keys).view(-1, 1, 1, 1)
        read = valid.repeat_interleave(size, -1) & (places < limit)
        return BlockSelection(places.masked_fill(~read, 0).int(), read).sorted()

    def route(self, q: Tensor, k: Tensor, query_positions: Tensor | None, lengths: Tensor | None) -> Routes:
        """Which regions are read; see `attend_segments` for the blocks of queries.

        Raises:
            ConfigError: ``regions`` and ``lengths`` are given both.
        """
        with torch.set_grad_enabled(self.config.soft_routing and torch.is_grad_enabled()):
            scores = self._scores(q, k, query_positions, lengths)
            most = min(self.config.top_k - (query_positions is not None), scores.shape[-1])
            judged = scores.detach()
            if self.config.first_region and query_positions is not None:
                first = torch.arange(scores.shape[-1], device=q.device) == 0
                judged = judged.masked_fill(first & (judged > -torch.inf), torch.inf)
            found = top_recent(judged, most)
            index, valid = found.index.long(), found.valid
            if not self.config.soft_routing:
                return Routes(index, valid, None)
            chosen = scores.gather(-1, index).masked_fill(~valid, torch.finfo(scores.dtype).min)
            return Routes(index, valid, chosen.softmax(-1))

    def _scores(self, q: Tensor, k: Tensor, query_positions: Tensor | None, lengths: Tensor | None) -> Tensor:
        """float ``[B, G, Q, R]``, -inf for regions that may not be read."""
        size, (heads, queries, width) = self._size(k.shape[2], lengths), q.shape[1:]
        keys = QueryBlocks.placeless(k.shape[2], size, k.device)
        far, held = _means(keys, k, lengths)
        allowed = held.transpose(2, 3) > 0
        if query_positions is None:
            blocks = QueryBlocks.placeless(queries, size, q.device)
            near, _ = _means(blocks, q, lengths if queries == k.shape[2] else None)
        else:
            blocks = QueryBlocks.aligned(query_positions, size)
            near = blocks.first_queries(q)
            allowed = allowed & (keys.home < blocks.home[:, None])
        near = near.unflatten(1, (k.shape[1], -1)).sum(2) * (heads * width) ** -0.5
        if self.config.per_key_head:
            scores: Tensor = near @ far.transpose(2, 3)
        else:
            scores = (near.transpose(1, 2).flatten(2) @ far.transpose(1, 2).flatten(2).transpose(1, 2)).unsqueeze(1)
        judged: Tensor = scores.masked_fill(~allowed, -torch.inf)
        return judged

    def _size(self, keys: int, lengths: Tensor | None) -> int:
        if self.config.regions is None:
            return self.config.region_size or _REGION_SIZE
        if lengths is not None:
            raise ConfigError(f"regions: expected region_size where rows have lengths, got regions={self.config.regions}")
        return -(-keys // self.config.regions)

    def _enhanced(self, q: Tensor, v: Tensor, query_positions: Tensor | None, lengths: Tensor | None) -> Tensor:
        """The convolution of the values at the places of the queries, ``[B, H, T, e_v]``."""
        assert self.local is not None
        (heads, queries), (key_heads, keys, width) = q.shape[1:3], v.shape[1:]
        if key_heads * width != self.config.local_channels:
            raise ConfigError(f"local_channels: expected {key_heads * width}, the values' channels, got {self.config.local_channels}")
        if query_positions is None and queries != keys:
            raise ConfigError(f"local_kernel: expected query_positions, or as many queries as keys; got {queries} and {keys}")
        if lengths is not None:
            v = v.masked_fill((torch.arange(keys, device=v.device) >= lengths[:, None])[:, None, :, None], 0.0)
        reach = self.config.local_kernel - 1
        before = reach if query_positions is not None else reach // 2
        found = self.local(F.pad(v.transpose(2, 3).flatten(1, 2), (before, reach - before)))
        found = found.unflatten(1, (key_heads, width)).transpose(2, 3).repeat_interleave(heads // key_heads, 1)
        if query_positions is not None:
            found = found[:, :, query_positions]
        if lengths is not None:
            found = found.masked_fill((lengths == 0).view(-1, 1, 1, 1), 0.0)
        enhanced: Tensor = found
        return enhanced


def region_flops(length: int, regions: int, top_k: int, width: int) -> float:
    """The cost that the paper gives (§3.3): ``3 N C² + 2 R² C + 2 N k (N / R) C`` for projections, routing and attention.

    It counts routing as floating-point operations and the rest as multiply-adds; see `region_macs` for what is executed.
    """
    return 3.0 * length * width**2 + 2.0 * regions**2 * width + 2.0 * length * top_k * (length / regions) * width


def region_macs(length: int, regions: int, top_k: int, width: int) -> int:
    """Multiply-adds of a bidirectional call, without projections: ``R² C + 2 N k (N / R) C``; R divides N, C is the heads' width."""
    return regions**2 * width + 2 * length * top_k * (length // regions) * width


def optimal_regions(length: int, top_k: int) -> float:
    """Where `region_flops` is lowest: ``(k N² / 2)^(1/3)``, so that the cost is O(N^(4/3))."""
    return float((top_k * length**2 / 2.0) ** (1.0 / 3.0))


def _means(blocks: QueryBlocks, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean ``[B, H, Q, e]`` of each block's tokens, zeros where it has none, and their number ``[B or 1, 1, Q, 1]``."""
    total, count = blocks.sums(x, lengths)
    return total / count.clamp(min=1), count
