# SPDX-License-Identifier: Apache-2.0
"""Queries and keys with a planted skewed attention, and what a choice of keys loses of it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Planted:
    """Queries, keys and values ``[1, H, N, e]``, and where sessions begin, bool ``[1, N]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    begins: Tensor


def sessions(length: int, shortest: int, longest: int, seed: int = 0) -> Tensor:
    """bool ``[length]``: where sessions of ``shortest`` to ``longest`` events begin, all lengths as likely."""
    drawn = torch.randint(shortest, longest + 1, (length // shortest + 1,), generator=torch.Generator().manual_seed(seed))
    starts = torch.nn.functional.pad(drawn.cumsum(0), (1, 0))
    begins = torch.zeros(length, dtype=torch.bool)
    begins[starts[starts < length]] = True
    return begins


def topical(begins: Tensor, heads: int, width: int, topics: int, sharp: float = 1.0, noise: float = 0.3, seed: int = 0) -> Planted:
    """Sessions that each have one of some topics, and queries that look for events of their own session's topic.

    A key is its topic's vector and ``noise`` of standard deviation, a query ``sharp`` times its topic's vector and noise of 1, a value its
    topic's and noise of 1. An event of the query's own topic has a logit that is about ``sharp √e`` above the others'.
    """
    drawn = torch.Generator().manual_seed(seed)
    of = torch.randint(topics, (int(begins.sum()) + 1,), generator=drawn)[begins.long().cumsum(0)]
    vectors = torch.randn(heads, topics, width, generator=drawn)[:, of]
    shape = (heads, len(begins), width)
    k = vectors + noise * torch.randn(shape, generator=drawn)
    q = sharp * vectors + torch.randn(shape, generator=drawn)
    v = torch.randn(heads, topics, width, generator=drawn)[:, of] + torch.randn(shape, generator=drawn)
    return Planted(q[None], k[None], v[None], begins[None])


def skewed(length: int, heads: int, width: int, deviation: float, run: int = 16, seed: int = 0) -> Planted:
    """Keys whose logits are normal with a ``deviation``, so that attention is log-normal.

    Half of a logit's variance is common to the heads, and four fifths are common to ``run`` adjacent keys. All queries share a direction.
    """
    drawn = torch.Generator().manual_seed(seed)

    def coherent(rows: int) -> Tensor:
        runs = torch.randn(rows, -(-length // run), generator=drawn).repeat_interleave(run, 1)[:, :length]
        mixed: Tensor = 0.8**0.5 * runs + 0.2**0.5 * torch.randn(rows, length, generator=drawn)
        return mixed

    weight = deviation * 0.5**0.5 * (coherent(1) + coherent(heads))
    direction = torch.nn.functional.normalize(torch.randn(heads, 1, width, generator=drawn), dim=-1)
    k = torch.randn(heads, length, width, generator=drawn).mul_(0.3).addcmul_(weight[..., None], direction)
    q = torch.randn(heads, length, width, generator=drawn).add_(width**0.5 * direction)
    v = torch.randn(heads, length, width, generator=drawn)
    return Planted(q[None], k[None], v[None], torch.zeros(1, length, dtype=torch.bool))


def rotated(x: Tensor, base: float = 500_000.0, first: int = 0) -> Tensor:
    """``[…, N, e]`` with rotary positions from ``first`` on, columns i and i + e/2 as pairs."""
    half = x.shape[-1] // 2
    place, frequency = first + torch.arange(x.shape[-2]), base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = place[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    near, far = x[..., :half], x[..., half:]
    return torch.cat((near * cos - far * sin, near * sin + far * cos), -1)


def weights(q: Tensor, k: Tensor, positions: Tensor | None = None) -> Tensor:
    """The attention ``[1, H, T, N]`` of queries at ``positions``; None where they read all."""
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if positions is not None:
        logits.masked_fill_(torch.arange(k.shape[2]) > positions[:, None], -torch.inf)
    attention: Tensor = logits.softmax(-1)
    return attention


@dataclass(frozen=True)
class Loss:
    """What queries lose when they read only some keys.

    Attributes:
        share: how concentrated attention is: what the best hundredth of the keys have of it.
        mass: the share of their dense attention that is not read, the mean over heads and queries.
        error: of their results, the norm of the difference over the norm of the dense ones.
    """

    share: float
    mass: float
    error: float

    @property
    def worse(self) -> float:
        """The larger of the two."""
        return max(self.mass, self.error)

    def __str__(self) -> str:
        return f"{self.mass:.2%} of attention dropped, {self.error:.2%} output error (top 1% of keys have {self.share:.0%})"


def loss(attention: Tensor, read: Tensor, v: Tensor) -> Loss:
    """The loss of dense ``attention`` ``[1, H, T, N]`` where bool ``read``, broadcastable to it, is what is read of values ``v``."""
    kept = attention * read
    share = kept.sum(-1, keepdim=True)
    dense, ours = attention @ v, (kept @ v) / share.clamp(min=1e-30)
    return Loss(top_share(attention), float(1 - share.double().mean()), float((ours - dense).norm() / dense.norm()))


def top_share(attention: Tensor, share: float = 0.01) -> float:
    """What the ``share`` of keys with the most attention have of it."""
    return float(attention.topk(max(1, int(share * attention.shape[-1])), dim=-1, sorted=False).values.sum(-1).mean())
