# SPDX-License-Identifier: Apache-2.0
"""Token Sparse Attention: each head computes attention among its own subset of tokens, and adds nothing to the others."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from recsys.core import components
from recsys.core.components import component_config, register
from recsys.core.errors import ConfigError
from recsys.efficiency.attend import dense_attend, gather_keys
from recsys.efficiency.attention.base import SparseAttention, SparseAttentionConfig
from recsys.efficiency.selection import BlockSelection

_SCORED = 1 << 24  # attention weights of the last window that are computed at once


@register("sparse_attention", "token_sparse")
class TokenSparseAttention(SparseAttention):
    """Compress, attend, decompress (Token Sparse Attention, §5 of the specification).

    A token's score is the mean attention of the last ``window`` queries to it, smoothed over its neighbours. The tokens before the window
    whose scores, averaged over the heads, sum to less than ``tau`` give the number of tokens to drop, the same for all heads of a row
    (dynamic token coverage); each head drops its own lowest. Queries, keys and values of the kept tokens go through any attention, its
    results back to their places, zeros to all others. A bias behind it would still reach these: leave it out, or mask it.

    What may leak: the last window's queries choose for the whole row. The method is meant for reading a history whose last state, or last
    window, goes on: nothing behind a row's last token has a say. Where every position is read out, as in training on all positions, an
    earlier position's result depends on later tokens through the choice, though never through keys and values.

    Where a call has not as many queries as keys, or queries at other places than the keys', attention is dense: the last window's queries
    are not all there to choose, and a decoding query that is dropped would read nothing. Without ``query_positions`` every kept token
    reads all kept ones: tokens to be judged for (target, candidates) then stand last, as the window.

    The paper's release assumes one row (the number to drop is one for the batch). Here each row has its own, padding takes no part, and
    of equal scores the later token stays. Padding gets zeros, except where no row drops anything: then the inner attention's result is
    returned as it is.
    """

    class Config(SparseAttentionConfig):
        """What is kept.

        Attributes:
            window: last tokens of a row, which choose and are always kept.
            kernel: scores are averaged over so many neighbours, an odd number.
            tau: the share of attention that may be dropped (and one token more), in [0, 1); 0 is dense.
            min_tokens: tokens before the window that are kept in any case.
            per_key_head: whether the query heads of a key head share a choice, by the mean of their scores, so that keys are not repeated.
            inner: attends among the kept tokens; dense if null.
        """

        name: Literal["token_sparse"] = "token_sparse"
        window: int = Field(128, ge=1)
        kernel: int = Field(7, ge=1)
        tau: float = Field(0.005, ge=0.0, lt=1.0)
        min_tokens: int = Field(1024, ge=0)
        per_key_head: bool = False
        inner: component_config("sparse_attention", optional=True) = None  # type: ignore[valid-type]

        @field_validator("kernel")
        @classmethod
        def _odd(cls, kernel: int) -> int:
            if kernel % 2 == 0:
                raise ValueError(f"kernel: expected an odd number, got {kernel}")
            return kernel

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.inner: SparseAttention | None = None if config.inner is None else components.build("sparse_attention", config.inner)

    @property
    def causal(self) -> bool:
        """See `SparseAttention.causal`: the last window chooses for all places before it."""
        return False

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None, lengths: Tensor | None, scale: float | None
    ) -> Tensor:
        """See `SparseAttention.attend`."""
        keys = k.shape[2]
        square = q.shape[2] == keys
        if query_positions is not None:
            square = square and torch.equal(query_positions, torch.arange(keys, device=query_positions.device))
        if not square:
            return dense_attend(q, k, v, query_positions=query_positions, lengths=lengths, scale=scale)
        kept = self.choose(q, k, query_positions, lengths, scale)
        there = keys * k.shape[0] if lengths is None else int(lengths.clamp(max=keys).sum())
        if int(kept.valid.sum()) == there * kept.index.shape[1]:
            return self._inner(q, k, v, query_positions, lengths, scale)
        return self.attend_kept(q, k, v, kept, query_positions is not None, scale)

    @torch.no_grad()
    def choose(
        self, q: Tensor, k: Tensor, query_positions: Tensor | None, lengths: Tensor | None, scale: float | None = None
    ) -> BlockSelection:
        """The tokens that each head keeps, ``[B, G, 1, K]`` in ascending order; G is H, or H_kv with ``per_key_head``."""
        ends = torch.full((len(k),), k.shape[2], device=k.device) if lengths is None else lengths.clamp(max=k.shape[2])
        place = torch.arange(k.shape[2], device=k.device)
        prefix = place < (ends - self.config.window)[:, None]
        scores = window_scores(q, k, ends, self.config.window, query_positions is not None, scale)
        if self.config.per_key_head:
            scores = scores.unflatten(1, (k.shape[1], -1)).mean(2)
        scores = smoothed(scores.masked_fill(~prefix[:, None], 0.0), self.config.kernel).masked_fill(~prefix[:, None], 0.0)
        count = kept_counts(scores.mean(1), prefix, self.config.tau, self.config.min_tokens)
        ranked = (scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)).masked_fill(~prefix[:, None], -1.0)
        order = len(place) - 1 - ranked.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        keep = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, (place < count[:, None])[:, None].expand_as(order))
        window = (place < ends[:, None]) & ~prefix
        return BlockSelection.of_mask((keep | window[:, None])[:, :, None])

    def attend_kept(self, q: Tensor, k: Tensor, v: Tensor, kept: BlockSelection, causal: bool, scale: float | None = None) -> Tensor:
        """Attention among the kept tokens of each head, ``[B, H, N, e_v]`` with zeros for the others.

        Kept tokens stand in their order, so that a causal mask over them is the causal mask of their places.
        """
        heads, groups = q.shape[1], kept.index.shape[1]
        if groups == heads > k.shape[1]:
            k, v = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
        index, valid = kept.index[:, :, 0].long(), kept.valid[:, :, 0]
        query_index, query_valid = (x.repeat_interleave(heads // groups, 1) for x in (index, valid))
        lengths = valid[:, 0].sum(-1)
        positions = torch.arange(index.shape[-1], device=q.device) if causal else None
        uneven = not bool(valid.all())
        if causal and self.inner is None:
            uneven = False  # what stands behind a row's last kept token is read by padding only
        found = self._inner(compress(q, query_index), compress(k, index), compress(v, index), positions, lengths if uneven else None, scale)
        return decompress(found, query_index, query_valid, q.shape[2])

    def _inner(
        self, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None, lengths: Tensor | None, scale: float | None
    ) -> Tensor:
        attend = dense_attend if self.inner is None else self.inner
        found: Tensor = attend(q, k, v, query_positions=query_positions, lengths=lengths, scale=scale)
        return found


def compress(x: Tensor, index: Tensor) -> Tensor:
    """``[B, H, N, e]`` to ``[B, H, K, e]``: each head's tokens ``index`` int64 ``[B, H, K]``."""
    return gather_keys(x, index[:, :, None])[:, :, 0]


def decompress(x: Tensor, index: Tensor, valid: Tensor, count: int) -> Tensor:
    """``[B, H, K, e]`` back to ``[B, H, count, e]``, zeros where nothing ``valid`` comes to; no place stands twice in ``index``."""
    batch, heads, _, width = x.shape
    first = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * count
    flat = x.masked_fill(~valid[..., None], 0.0).flatten(0, 2)
    return x.new_zeros(batch * heads * count, width).index_copy(0, (first + index).flatten(), flat).view(batch, heads, count, width)


def window_scores(q: Tensor, k: Tensor, ends: Tensor, window: int, causal: bool, scale: float | None = None) -> Tensor:
    """The mean attention of each row's last queries, float32 or wider ``[B, H, N]``.

    Args:
        q: ``[B, H, N, e]``.
        k: ``[B, H_kv, N, e]``.
        ends: int64 ``[B]``, tokens of each row.
        window: queries; a shorter row has fewer.
        causal: whether a query reads only the keys up to its own place.
        scale: of the inner products; 1 / √e if None.
    """
    batch, heads, keys, width = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    window = min(window, keys)
    places = ends[:, None] - window + torch.arange(window, device=q.device)
    last_q = compress(q, places.clamp(min=0)[:, None].expand(-1, heads, -1)).to(wide) * (width**-0.5 if scale is None else scale)
    far = k.to(wide).repeat_interleave(heads // k.shape[1], 1).transpose(2, 3)
    place, total = torch.arange(keys, device=q.device), q.new_zeros(batch, heads, keys, dtype=wide)
    step = max(1, _SCORED // max(batch * heads * keys, 1))
    for at in range(0, window, step):
        own = places[:, at : at + step, None]
        hidden = place > own if causal else (place >= ends[:, None, None]).expand(-1, own.shape[1], -1)
        weights = (last_q[:, :, at : at + step] @ far).masked_fill(hidden[:, None], -torch.inf).softmax(-1)
        total = total + weights.masked_fill((own < 0)[:, None], 0.0).sum(2)
    return total / ends.clamp(1, window).view(-1, 1, 1).to(wide)


def smoothed(scores: Tensor, kernel: int) -> Tensor:
    """Means of ``kernel`` neighbours of ``[B, H, N]``; zeros stand outside."""
    return F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)


def kept_counts(scores: Tensor, prefix: Tensor, tau: float, min_tokens: int) -> Tensor:
    """Dynamic token coverage: int64 ``[B]``, how many tokens before the window each row keeps.

    The lowest scores that together stay below a share ``tau`` of a row's are dropped, and one more if there are any.

    Args:
        scores: float ``[B, N]``, at least 0.
        prefix: bool ``[B, N]``, the tokens before the window.
        tau: the share.
        min_tokens: kept in any case, where there are so many.
    """
    mass = scores.double().masked_fill(~prefix, 0.0)
    there = prefix.sum(-1)
    ordered = torch.where(prefix, mass, torch.inf).sort(dim=-1).values.nan_to_num(posinf=0.0).cumsum(-1)
    real = torch.arange(mass.shape[1], device=mass.device) < there[:, None]
    dropped = ((ordered < tau * mass.sum(-1, keepdim=True)) & real).sum(-1)
    dropped = dropped + (dropped > 0)
    return torch.maximum(there - dropped, there.clamp(max=min_tokens))


def layer_drift(states: Sequence[Tensor], held: Tensor | None = None) -> Tensor:
    """How far each layer moves a token, relative to where it was: float ``[layers]``, the mean over tokens of ``‖out − in‖ / ‖in‖``.

    Args:
        states: of the residual stream, each ``[…, d]``: before the first layer and after every one.
        held: bool ``[…]``, the places that hold a token; all if None.

    Raises:
        ConfigError: there are fewer than two states.
    """
    if len(states) < 2:
        raise ConfigError(f"layer_drift: states: expected one before the first layer and one after each, got {len(states)}")
    drifts = []
    for before, after in pairwise(states):
        size = before.norm(dim=-1).clamp(min=torch.finfo(before.dtype).tiny)
        moved = (after - before).norm(dim=-1) / size
        drifts.append((moved if held is None else moved[held]).mean())
    return torch.stack(drifts)


def sparse_layers(drift: Tensor, delta: float = 0.5) -> list[int]:
    """The layers that may be sparse: those whose drift, scaled to [0, 1] over the layers, is at most its ``delta`` quantile.

    Raises:
        ConfigError: ``delta`` is not in [0, 1].
    """
    if not 0.0 <= delta <= 1.0:
        raise ConfigError(f"sparse_layers: delta: expected 0 to 1, got {delta!r}")
    scaled = (drift - drift.min()) / (drift.max() - drift.min()).clamp(min=torch.finfo(drift.dtype).tiny)
    return [int(layer) for layer in (scaled <= scaled.quantile(delta)).nonzero()[:, 0]]
