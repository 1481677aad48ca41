# SPDX-License-Identifier: Apache-2.0
"""The index of DeepSeek sparse attention (DSA): a cheap score of every key for every query, means over blocks, and how it is trained."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recsys.core.errors import ConfigError, DataError


class BlockMeans:
    """Means of blocks of adjacent index keys, kept up to date while keys arrive. Only complete blocks have one.

    Rows of different lengths share a store: a block that is complete in the store but not in a row is never scored for that row.

    Args:
        size: B, keys of a block.

    Attributes:
        size: B.
        count: N, keys seen.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigError(f"size: expected at least 1 key for each block, got {size}")
        self.size = size
        self.count = 0
        self._means: Tensor | None = None
        self._open: Tensor | None = None

    @classmethod
    def of(cls, keys: Tensor, size: int) -> "BlockMeans":
        """The means of keys ``[B, G, N, d]``."""
        store = cls(size)
        store.append(keys)
        return store

    @property
    def means(self) -> Tensor:
        """``[B, G, N // size, d]``.

        Raises:
            DataError: nothing was appended yet.
        """
        if self._means is None:
            raise DataError("BlockMeans: expected keys to be appended first, got none")
        return self._means

    def append(self, keys: Tensor) -> None:
        """Take keys ``[B, G, n, d]`` that come after those seen; what came before is only touched when a block fills, and then as means."""
        if self._means is None or self._open is None:
            self._means = keys.new_zeros(*keys.shape[:2], 0, keys.shape[-1])
            self._open = keys.new_zeros(*keys.shape[:2], 1, keys.shape[-1], dtype=torch.promote_types(keys.dtype, torch.float32))
        filled = self.count % self.size
        place = (filled + torch.arange(keys.shape[2], device=keys.device)) // self.size
        blocks = (filled + keys.shape[2]) // self.size
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        sums = wide.new_zeros(*keys.shape[:2], blocks + 1, keys.shape[-1]).index_add(2, place, wide)
        sums[:, :, :1] += self._open
        if blocks:
            self._means = torch.cat((self._means, (sums[:, :, :blocks] / self.size).to(keys.dtype)), 2)
        self._open = sums[:, :, blocks:]
        self.count += keys.shape[2]


@dataclass(frozen=True)
class IndexInputs:
    """What an indexer reads.

    Attributes:
        q: ``[B, H_I, T, d_I]``, index queries.
        k: ``[B, G, N, d_I]``, index keys: G = 1 as in DSA, or any divisor of H_I; key head g serves the query heads g H_I / G onwards.
        gates: ``[B, H_I, T]``, the weight of each query head; None for 1.
        means: of the keys' blocks, where they are kept while decoding; None has them computed when they are needed.
    """

    q: Tensor
    k: Tensor
    gates: Tensor | None = None
    means: BlockMeans | None = None

    def __post_init__(self) -> None:
        if self.q.dim() != 4 or self.k.dim() != 4 or self.q.shape[1] % self.k.shape[1] or self.q.shape[-1] != self.k.shape[-1]:
            raise ConfigError(
                f"index: expected q [B, H_I, T, d_I] and k [B, G, N, d_I] with G dividing H_I, "
                f"got {tuple(self.q.shape)} and {tuple(self.k.shape)}"
            )
        if self.gates is not None and self.gates.shape != self.q.shape[:3]:
            raise ConfigError(f"index: gates: expected [B, H_I, T] = {tuple(self.q.shape[:3])}, got {tuple(self.gates.shape)}")
        if self.means is not None and self.means.count != self.k.shape[2]:
            raise ConfigError(f"index: means: expected those of {self.k.shape[2]} keys, got those of {self.means.count}")

    def queries(self, part: slice) -> "IndexInputs":
        """The same for a part of the queries."""
        return IndexInputs(self.q[:, :, part], self.k, None if self.gates is None else self.gates[:, :, part], self.means)


class IndexerProjection(nn.Module):
    """DSA's trainable indexer: from hidden states to index queries, one shared index key for each token, and gates.

    The gates are ``Linear(x) · H_I^-1/2 · d_I^-1/2`` and the keys are layer-normed, as in DeepSeek-V3.2-Exp. Its partial rotation, Hadamard
    transform and fp8 are not here: the first belongs to the model that calls (rotate ``q`` and ``k`` of the result), the others to a
    kernel. DeepSeek projects the queries from its low-rank query latent; here they come from the hidden state as the rest does.

    Args:
        width: D of the hidden states.
        heads: H_I.
        dim: d_I.
    """

    def __init__(self, width: int, heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.query = nn.Linear(width, heads * dim, bias=False)
        self.key = nn.Linear(width, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(width, heads, bias=False)

    def forward(self, hidden_bld: Tensor) -> IndexInputs:
        """Index queries, keys and gates of hidden states ``[B, L, D]``; detach these to train the indexer alone, as DSA does."""
        q = self.query(hidden_bld).unflatten(-1, (self.heads, self.dim)).transpose(1, 2)
        gates = self.gate(hidden_bld).transpose(1, 2) * (self.heads * self.dim) ** -0.5
        return IndexInputs(q, self.norm(self.key(hidden_bld))[:, None], gates)


def index_scores(q_bhqrd: Tensor, k_bgqpd: Tensor, gates_bhqr: Tensor | None = None) -> Tensor:
    """``I_{t,s} = Σ_j w_{t,j} relu(q_{t,j} · k_s)`` for Q blocks of R queries, each with P keys of its own: ``[B, Q, R, P]``.

    Args:
        q_bhqrd: index queries ``[B, H_I, Q, R, d_I]``.
        k_bgqpd: index keys ``[B, G, Q, P, d_I]``; G divides H_I.
        gates_bhqr: ``[B, H_I, Q, R]``; None for 1.
    """
    groups, queries = k_bgqpd.shape[1], q_bhqrd.shape[3]
    q_bgqjrd = q_bhqrd.unflatten(1, (groups, -1)).transpose(2, 3)
    inner = (q_bgqjrd.flatten(3, 4) @ k_bgqpd.transpose(-1, -2)).relu().unflatten(3, (-1, queries))
    if gates_bhqr is not None:
        inner = inner * gates_bhqr.unflatten(1, (groups, -1)).transpose(2, 3)[..., None]
    scores: Tensor = inner.sum((1, 3))
    return scores


def indexer_loss(scores: Tensor, attention: Tensor, allowed: Tensor | None = None) -> Tensor:
    """What trains an indexer: KL(p ‖ softmax(I)), p the attention summed over heads and scaled to sum 1; the mean over queries.

    Over all readable keys in the dense warm-up, over the chosen ones in sparse training (DeepSeek-V3.2). The attention is a constant here.

    Args:
        scores: I, ``[B, 1, T, N]``, see `FlatIndexer.score`.
        attention: probabilities ``[B, H, T, N]``.
        allowed: bool, broadcastable to ``scores``: the keys that count; None for all. A query without any is left out.
    """
    allowed = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed.expand_as(scores)
    mass = attention.detach().sum(1, keepdim=True).masked_fill(~allowed, 0.0)
    whole = mass.sum(-1, keepdim=True)
    target = mass / whole.clamp(min=torch.finfo(mass.dtype).tiny)
    lowest = torch.finfo(scores.dtype).min
    log_share = scores.masked_fill(~allowed, lowest).log_softmax(-1)
    divergence = (torch.xlogy(target, target) - target * log_share.masked_fill(~allowed, 0.0)).sum(-1)
    counts = (whole > 0).squeeze(-1)
    loss: Tensor = divergence[counts].sum() / counts.sum().clamp(min=1)
    return loss
