# SPDX-License-Identifier: Apache-2.0
"""HSTU: a history encoded by itself, so that it becomes several vectors."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from recsys.core.components import register
from recsys.core.errors import ConfigError
from recsys.data.spec import SequenceSpec
from recsys.layers.hstu import HSTULayer
from recsys.ranking.history.attention import TargetAttention
from recsys.ranking.history.base import Events, Histories, HistoryConfig, HistoryEncoder


@register("history", "hstu")
class HSTU(HistoryEncoder):
    """Layers of HSTU over a history and the candidate, read out as one or more vectors (arXiv 2402.17152).

    The fields are ``name.0`` to ``name.(n - 1)``: the last encoded events, the newest behind the others, then target attention's
    vector. Where there are fewer events than vectors, the first are a learned vector, zero at first. The candidate, if it is appended,
    is the newest event and sees all others; none sees it, so that a history's own encoding is the same for every candidate.

    Of a history longer than the window the last events are read. Rows are padded at the end, where causality hides the filling.

    Chosen where paper and public code differ or are silent: ``α = 1 / √d_h``; a bias by distance alone, without the one by time;
    LayerNorm over all heads together; no embedding of positions and no norm behind the last layer, so that the vectors stay in the
    space of the candidate's embedding that the residual carries.

    Raises:
        ConfigError: heads do not divide d; no vector is read out.
    """

    class Config(HistoryConfig):
        """Besides the `HistoryConfig`, sizes and readout.

        Attributes:
            layers: how many.
            heads: a divisor of the embedding's dim.
            max_length: the window: how many events are read, with the candidate if it is appended; N in the paper.
            candidate: whether the candidate is appended.
            vectors: how many of the last encoded events are read out.
            attention: target attention over the encoded events of the history (without the candidate), which adds one vector; null for
                none.
            dropout: within each layer.
        """

        name: Literal["hstu"] = "hstu"
        layers: int = Field(2, ge=1)
        heads: int = Field(1, ge=1)
        max_length: int = Field(100, ge=2)
        candidate: bool = True
        vectors: int = Field(1, ge=0)
        attention: TargetAttention.Config | None = None
        dropout: float = Field(0.0, ge=0, lt=1)

    def __init__(self, config: Config, sequence: SequenceSpec, dim: int, extra_widths: Sequence[int] | None = None) -> None:
        super().__init__(sequence, dim, extra_widths, config.pruning)
        if dim % config.heads:
            raise ConfigError(f"{sequence.name}: expected heads that divide the embedding's dim, got dim={dim} and heads={config.heads}")
        if not config.vectors and config.attention is None:
            raise ConfigError(f"{sequence.name}: expected vectors of 1 or more, or attention; got vectors=0 and no attention")
        self.config = config
        self.vectors = config.vectors + (config.attention is not None)
        self.layers = nn.ModuleList(HSTULayer(dim, config.heads, config.max_length, config.dropout) for _ in range(config.layers))
        self.empty = nn.Parameter(torch.zeros(dim)) if config.vectors > config.candidate else None
        # Without the extras: the vectors that it pools have them in already.
        pooled = sequence.model_copy(update={"keys": sequence.keys[:1]})
        self.attention = None if config.attention is None else TargetAttention(config.attention, pooled, dim)

    def encode(self, events: Events) -> Tensor:
        """``[B, n, d]``."""
        if events.histories is not None:
            return self._encode_shared(events, events.histories)
        events = events.spread()
        kept_b = events.lengths.long().clamp(max=self.config.max_length - self.config.candidate)
        x_bld = self._pad(events, kept_b)
        for layer in self.layers:
            x_bld = layer(x_bld)
        read = [self._last(x_bld, kept_b)] if self.config.vectors else []
        if self.attention is not None:
            read.append(self.attention.encode(self._unpad(x_bld, events, kept_b))[:-1])
        return torch.cat(read, dim=1)

    def _encode_shared(self, events: Events, histories: Histories) -> Tensor:
        """``[R, n, d]``: each history once, since no event sees the candidate; then each candidate behind its history."""
        window, lengths_b = self.config.max_length - self.config.candidate, histories.offsets.diff()
        kept_b = lengths_b.clamp(max=window)
        place_l = torch.arange(window if torch.compiler.is_compiling() else max(1, int(kept_b.max())), device=kept_b.device)
        count = events.vectors.shape[0]
        source_bl = torch.where(place_l < kept_b[:, None], (histories.offsets[1:] - kept_b)[:, None] + place_l, count)
        x_bld = functional.embedding(source_bl, torch.cat([events.vectors, events.vectors.new_zeros(1, self.dim)]))
        candidate_rd = events.target
        for layer in self.layers:
            if self.config.candidate:
                candidate_rd = cast(HSTULayer, layer).candidates(x_bld, kept_b, histories.of_row, candidate_rd)
            x_bld = layer(x_bld)
        read = []
        if self.empty is not None:
            wanted = self.config.vectors - self.config.candidate
            place_rv = kept_b[histories.of_row][:, None] - wanted + torch.arange(wanted, device=kept_b.device)
            encoded_rvd = x_bld[histories.of_row[:, None], place_rv.clamp(min=0)]
            read.append(torch.where(place_rv[:, :, None] >= 0, encoded_rvd, self.empty))
        if self.config.vectors and self.config.candidate:
            read.append(candidate_rd[:, None])
        if self.attention is not None:
            read.append(self.attention.encode(self._shared_events(x_bld, events, histories, kept_b))[:-1])
        return torch.cat(read, dim=1)

    def _shared_events(self, x_bld: Tensor, events: Events, histories: Histories, kept_b: Tensor) -> Events:
        """As `_unpad` of rows that share histories: what the window left out is read by one row more."""
        assert events.event is not None
        lengths_b, count, rows = histories.offsets.diff(), events.vectors.shape[0], events.lengths.shape[0]
        history_n = torch.repeat_interleave(lengths_b, output_size=count)
        place_n = torch.arange(count, device=kept_b.device) - (histories.offsets[1:] - kept_b)[history_n]
        encoded_nd = x_bld[history_n, place_n.clamp(min=0)]
        row_p = torch.where(place_n[events.event] >= 0, events.row, rows)
        kept_r = kept_b[histories.of_row]
        left_out = (events.lengths - kept_r).sum(dim=0, keepdim=True)
        target = torch.cat([events.target, events.target.new_zeros(1, self.dim)])
        return Events(encoded_nd, row_p, torch.cat([kept_r, left_out]), target, events.event)

    def _pad(self, events: Events, kept_b: Tensor) -> Tensor:
        """``[B, L, d]``: the last events of each row from the left, the candidate behind them, zeros behind it."""
        lengths_b = events.lengths.long()
        count, rows = events.vectors.shape[0], lengths_b.shape[0]
        firsts_b = lengths_b.cumsum(0) - kept_b
        place_l = torch.arange(self._width(kept_b), device=kept_b.device)
        source_bl = torch.where(place_l < kept_b[:, None], firsts_b[:, None] + place_l, count + rows)
        if self.config.candidate:
            of_row_b1 = count + torch.arange(rows, device=kept_b.device)[:, None]
            source_bl = torch.where(place_l == kept_b[:, None], of_row_b1, source_bl)
        everything = torch.cat([events.vectors, events.target, events.target.new_zeros(1, self.dim)])
        padded_bld: Tensor = functional.embedding(source_bl, everything)
        return padded_bld

    def _width(self, kept_b: Tensor) -> int:
        """L: the longest row, at least 1; the whole window where a graph is captured, whose shapes must not depend on the data."""
        if torch.compiler.is_compiling() or kept_b.shape[0] == 0:
            return self.config.max_length
        return max(1, int(kept_b.max()) + self.config.candidate)

    def _last(self, x_bld: Tensor, kept_b: Tensor) -> Tensor:
        """``[B, vectors, d]``: the last encoded events, ``empty`` where there are not so many."""
        wanted = self.config.vectors
        place_bv = (kept_b + self.config.candidate)[:, None] - wanted + torch.arange(wanted, device=kept_b.device)
        encoded_bvd = x_bld.gather(1, place_bv.clamp(min=0)[:, :, None].expand(-1, -1, self.dim))
        # The one vector of a row with a candidate is always there.
        return encoded_bvd if self.empty is None else torch.where(place_bv[:, :, None] >= 0, encoded_bvd, self.empty)

    def _unpad(self, x_bld: Tensor, events: Events, kept_b: Tensor) -> Events:
        """The encoded events as a jagged batch of B + 1 rows: the last holds what the window left out, so that no shape depends on it."""
        rows, lengths_b = kept_b.shape[0], events.lengths.long()
        place_n = torch.arange(events.row.shape[0], device=kept_b.device) - (lengths_b.cumsum(0) - lengths_b)[events.row]
        place_n = place_n - (lengths_b - kept_b)[events.row]
        encoded_nd = x_bld[events.row, place_n.clamp(min=0)]
        row_n = torch.where(place_n >= 0, events.row, rows)
        left_out = (lengths_b - kept_b).sum(dim=0, keepdim=True)
        return Events(encoded_nd, row_n, torch.cat([kept_b, left_out]), torch.cat([events.target, events.target.new_zeros(1, self.dim)]))
