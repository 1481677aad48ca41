# SPDX-License-Identifier: Apache-2.0
"""One shape of selected attention, and how its queries are grouped: all that read the same gathered keys stand together."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional


class Case(NamedTuple):
    """A shape, for tests, benchmarks and compilation.

    Attributes:
        batch: B.
        heads: H.
        key_heads: H_kv.
        queries: T.
        keys: N.
        groups: G: 1, H_kv or H.
        blocks: Q.
        kept: K.
        width: e.
        value_width: e_v.
        causal: whether queries have a last place.
    """

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    groups: int
    blocks: int
    kept: int
    width: int
    value_width: int
    causal: int

    @property
    def layout(self) -> "Layout":
        """How its queries are grouped."""
        return Layout(self.batch, self.heads, self.key_heads, self.queries, self.blocks, self.groups)


@dataclass(frozen=True)
class Layout:
    """P units of R queries for each row and key head; a unit's queries read the same rows.

    Where the query heads of a key head share a choice, their queries of one block form a unit, head after head: P = Q and
    R = ``H / H_kv · ceil(T / Q)``. Where each query head chooses by itself (``own``), P = ``H / H_kv · Q`` and R = ``ceil(T / Q)``.
    """

    batch: int
    heads: int
    key_heads: int
    queries: int
    blocks: int
    groups: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, index: Tensor) -> "Layout":
        """Of ``q [B, H, T, e]``, ``k [B, H_kv, N, e]`` and ``index [B, G, Q, K]``."""
        batch, heads, queries, _ = q.shape
        return cls(batch, heads, k.shape[1], queries, index.shape[2], index.shape[1])

    @property
    def size(self) -> int:
        """Adjacent queries of one head in a block."""
        return -(-self.queries // self.blocks)

    @property
    def sharing(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.key_heads

    @property
    def own(self) -> bool:
        """Whether the query heads of a key head choose apart."""
        return self.groups == self.heads > self.key_heads

    @property
    def units(self) -> int:
        """P."""
        return self.blocks * (self.sharing if self.own else 1)

    @property
    def rows(self) -> int:
        """R."""
        return self.size * (1 if self.own else self.sharing)

    def fold(self, x_bhte: Tensor) -> Tensor:
        """``[B, H, T, e]`` → ``[B P, H_kv, R, e]``, with zeros for the queries that the last block lacks."""
        missing = self.blocks * self.size - self.queries
        x_bhte = functional.pad(x_bhte, (0, 0, 0, missing)) if missing else x_bhte
        x = x_bhte.reshape(self.batch, self.key_heads, self.sharing, self.blocks, self.size, -1)
        x = x.permute(0, 2, 3, 1, 4, 5) if self.own else x.permute(0, 3, 1, 2, 4, 5)
        return x.reshape(self.batch * self.units, self.key_heads, self.rows, -1)

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse of `fold`, contiguous."""
        if self.own:
            x = x.view(self.batch, self.sharing, self.blocks, self.key_heads, self.size, -1).permute(0, 3, 1, 2, 4, 5)
        else:
            x = x.view(self.batch, self.blocks, self.key_heads, self.sharing, self.size, -1).permute(0, 2, 3, 1, 4, 5)
        return x.reshape(self.batch, self.heads, self.blocks * self.size, -1)[:, :, : self.queries].contiguous()

    def fold_choice(self, x_bgqk: Tensor) -> Tensor:
        """``[B, G, Q, K]`` → ``[B P, G', K]``, G' of 1 or H_kv."""
        if self.own:
            x_bgqk = x_bgqk.unflatten(1, (self.key_heads, self.sharing)).flatten(2, 3)
        return x_bgqk.transpose(1, 2).flatten(0, 1)

    def fold_last(self, last_t: Tensor) -> Tensor:
        """``[T]`` → ``[P, ceil(T / Q)]``, the same for all heads of a unit; -1 for the queries that the last block lacks."""
        last_qt = functional.pad(last_t, (0, self.blocks * self.size - self.queries), value=-1).view(self.blocks, self.size)
        return last_qt.repeat(self.sharing, 1) if self.own else last_qt
