# SPDX-License-Identifier: Apache-2.0
"""What every sparse attention offers to a model."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.efficiency.attend import dense_attend, sparse_attend
from recsys.efficiency.selection import BlockSelection


class SparseAttentionConfig(BaseConfig):
    """What all have in common.

    Attributes:
        min_length: a row of at most so many keys is attended to densely: below it choosing costs more than it saves.
    """

    min_length: int = Field(4096, ge=0)


class SparseAttention(nn.Module, ABC):
    """Stands in the place of fused attention, after the projections. Registered with ``@register("sparse_attention", name)``.

    Keeping everything is dense attention. A row's result does not depend on its batch mates. Where ``causal``, no key behind a query has an
    influence on its result.
    """

    config: SparseAttentionConfig
    needs_rotary: ClassVar[bool] = False  # whether queries and keys must carry rotary positions

    @property
    def causal(self) -> bool:
        """Whether nothing behind a query's place has an influence on its result, be it through what was chosen."""
        return True

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
        """Attention of T queries to N keys.

        Args:
            q: ``[B, H, T, e]``.
            k: ``[B, H_kv, N, e]``; H_kv divides H.
            v: ``[B, H_kv, N, e_v]``.
            query_positions: int64 ``[T]``, ascending: the place of each query among the keys; it reads that and those before. None where
                every query reads all keys.
            lengths: int64 ``[B]``, the keys that each right-padded row has; None where all have N.
            scale: of the inner products; 1 / √e if None.
            told: what a form reads besides, by the names that its `attend` has; without effect where attention is dense.

        Returns:
            ``[B, H, T, e_v]``; zeros for a query that may read nothing.

        Raises:
            ConfigError: ``query_positions`` are not one for each query, ascending, among the keys.
        """
        _check_positions(query_positions, q, k)
        if k.shape[2] <= self.config.min_length or not len(q) or not q.shape[2]:
            return dense_attend(q, k, v, query_positions=query_positions, lengths=lengths, scale=scale)
        attended = self.attend(q, k, v, query_positions, lengths, scale, **told)
        return self._whole_where_short(attended, q, k, v, query_positions, lengths, scale)

    def _whole_where_short(
        self, attended: Tensor, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None, lengths: Tensor | None, scale: float | None
    ) -> Tensor:
        """What was attended to, but for the rows of at most ``min_length`` keys, which are dense whatever their batch mates."""
        short = None if lengths is None else (lengths <= self.config.min_length).nonzero()[:, 0]
        if lengths is None or short is None or not len(short):
            return attended
        dense = dense_attend(q[short], k[short], v[short], query_positions=query_positions, lengths=lengths[short], scale=scale)
        return attended.index_copy(0, short, dense)

    @abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None, lengths: Tensor | None, scale: float | None
    ) -> Tensor:
        """`forward` with more than ``min_length`` keys."""


class SelectedAttention(SparseAttention):
    """Chooses keys from queries and keys, then attends to these exactly."""

    @abstractmethod
    def choose(self, q: Tensor, k: Tensor, query_positions: Tensor | None, lengths: Tensor | None) -> BlockSelection:
        """The keys that each block of queries reads."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None, lengths: Tensor | None, scale: float | None
    ) -> Tensor:
        """See `SparseAttention.attend`."""
        with torch.no_grad():
            selection = self.choose(q, k, query_positions, lengths)
        return sparse_attend(q, k, v, selection, query_positions=query_positions, scale=scale)


def _check_positions(query_positions: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Hold what `SparseAttention.forward` asks of ``query_positions``.

    Raises:
        ConfigError: not one for each query, not ascending, or outside of the keys.
    """
    if query_positions is None:
        return
    if query_positions.shape != (q.shape[2],):
        raise ConfigError(f"query_positions: expected {q.shape[2]}, one for each query, got {tuple(query_positions.shape)}")
    outside = bool(((query_positions < 0) | (query_positions >= k.shape[2])).any())
    if outside or bool((query_positions[1:] < query_positions[:-1]).any()):
        raise ConfigError(f"query_positions: expected ascending places among the {k.shape[2]} keys, got {query_positions.tolist()}")
