# SPDX-License-Identifier: Apache-2.0
"""The interface of history encoders: a jagged history and a candidate become one or more field vectors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import DataError
from recsys.data.spec import SequenceSpec
from recsys.efficiency.history import HistoryPruning
from recsys.efficiency.view import TokenView, offsets_of


@dataclass(frozen=True)
class Histories:
    """How N events are divided into B histories, and which of them each of R rows reads.

    Attributes:
        offsets: int64 ``[B + 1]``: history b holds the events ``offsets[b]`` to ``offsets[b + 1] - 1``.
        of_row: int64 ``[R]``.
    """

    offsets: Tensor
    of_row: Tensor


@dataclass(frozen=True)
class Reads:
    """Which of N events each of R rows reads: P pairs of a row and an event, row after row.

    Attributes:
        lengths: int ``[R]``, the events of each row.
        row: int64 ``[P]``, ascending.
        event: int64 ``[P]``; None where pair p is event p, so that each row has events of its own.
        histories: of the events; None where row r reads history r.
    """

    lengths: Tensor
    row: Tensor
    event: Tensor | None = None
    histories: Histories | None = None

    @classmethod
    def own(cls, lengths_b: Tensor, count: int) -> Self:
        """Row b reads history b; there are ``count`` events in all."""
        return cls(lengths_b, torch.repeat_interleave(lengths_b.long(), output_size=count))

    @classmethod
    def shared(cls, lengths_b: Tensor, of_row: Tensor) -> Self:
        """Row r reads history ``of_row[r]``."""
        offsets = offsets_of(lengths_b.long())
        lengths_r = offsets.diff()[of_row]
        row = torch.repeat_interleave(lengths_r)
        before_r = lengths_r.cumsum(0) - lengths_r
        event = torch.arange(len(row), device=row.device) + (offsets[of_row] - before_r)[row]
        return cls(lengths_r, row, event, Histories(offsets, of_row))


@dataclass(frozen=True)
class Events:
    """The N events of histories, and the R candidates that they are read for.

    Attributes:
        vectors: ``[N, d]``, one history after another, oldest first.
        row: int64 ``[P]``, the row of each pair of a row and an event, see `Reads`.
        lengths: int ``[R]``, the events of each row.
        target: ``[R, d]``, the candidate's vector.
        event: int64 ``[P]``, or None where pair p is event p.
        histories: see `Reads`.
    """

    vectors: Tensor
    row: Tensor
    lengths: Tensor
    target: Tensor
    event: Tensor | None = None
    histories: Histories | None = None

    def spread(self) -> "Events":
        """With a vector for each pair: events that several rows read are there several times."""
        return self if self.event is None else Events(self.vectors[self.event], self.row, self.lengths, self.target)


class HistoryConfig(BaseConfig):
    """What all history encoders have in common.

    Attributes:
        pruning: which events are read, in training and when serving; they are judged for the candidate. Null to read all.
    """

    pruning: HistoryPruning.Config | None = None


class HistoryEncoder(nn.Module, ABC):
    """One history as ``vectors`` field vectors.

    Built as ``cls(config, sequence, dim, extra_widths)`` and registered with ``@register("history", name)``.

    An event's vector is its item's embedding plus a learned projection of each aligned extra, so that it stays in the space of the
    candidate's embedding, with which it shares a table.

    Args:
        sequence: which keys hold the events and the candidate.
        dim: d, the width of the items' embeddings, of the candidate's, and of each vector of the result.
        extra_widths: those of the aligned extras' embeddings, one for each of ``sequence.keys[1:]``; d by default.
        pruning: see `HistoryConfig`.

    Attributes:
        vectors: n, how many vectors a history becomes.
    """

    vectors: int = 1

    def __init__(
        self,
        sequence: SequenceSpec,
        dim: int,
        extra_widths: Sequence[int] | None = None,
        pruning: HistoryPruning.Config | None = None,
    ) -> None:
        super().__init__()
        self.pruning = None if pruning is None else HistoryPruning(pruning)
        self.sequence, self.dim = sequence, dim
        extras = sequence.keys[1:]
        widths = [dim] * len(extras) if extra_widths is None else extra_widths
        self.extras = nn.ModuleList(nn.Linear(width, dim, bias=False) for _, width in zip(extras, widths, strict=True))

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the n fields: the sequence's own where n is 1, else ``name.0`` to ``name.(n - 1)``."""
        name = self.sequence.name
        return (name,) if self.vectors == 1 else tuple(f"{name}.{i}" for i in range(self.vectors))

    def forward(self, sequences: Mapping[str, JaggedTensor]) -> Tensor:
        """``[B, n, d]``.

        Args:
            sequences: embeddings of the spec's keys and of its target, the latter one per row.

        Raises:
            DataError: the keys are not aligned, or a row does not have exactly one target.
        """
        return self.encode(self.pruned(self.events(sequences)))

    def read(self, values: Mapping[str, Tensor], reads: Reads) -> Tensor:
        """``[R, n, d]``, where rows may share histories.

        Args:
            values: vectors of the spec's keys, ``[N, width]``, and of its target, ``[R, d]``.
            reads: which events each row reads.

        Raises:
            DataError: see `forward`.
        """
        return self.encode(self.pruned(self._events(values, reads)))

    @abstractmethod
    def encode(self, events: Events) -> Tensor:
        """``[R, n, d]``; a row without events gets a result all the same."""

    def pruned(self, events: Events) -> Events:
        """The events that are read."""
        if self.pruning is None:
            return events
        events = events.spread()
        view = TokenView.of(events.vectors, offsets_of(events.lengths.long()), context=events.target[:, None])
        kept = self.pruning(view)
        return Events(kept.gather(events.vectors), kept.gather(events.row), kept.lengths.to(events.lengths.dtype), events.target)

    def events(self, sequences: Mapping[str, JaggedTensor]) -> Events:
        """The vectors of all events, and what belongs to them."""
        item = self.sequence.keys[0]
        values = {key: sequences[key].values() for key in (*self.sequence.keys, self.sequence.target)}
        return self._events(values, Reads.own(sequences[item].lengths(), values[item].shape[0]))

    def _events(self, values: Mapping[str, Tensor], reads: Reads) -> Events:
        item, *extras = self.sequence.keys
        target_rd = values[self.sequence.target]
        if target_rd.shape[0] != reads.lengths.shape[0]:
            expected = f"one {self.sequence.target!r} for each of {reads.lengths.shape[0]} rows"
            raise DataError(f"{self.sequence.name}: expected {expected}, got {target_rd.shape[0]}")
        events_nd = values[item]
        for key, project in zip(extras, self.extras, strict=True):
            values_nd = values[key]
            if values_nd.shape[0] != events_nd.shape[0]:
                expected = f"as many values of {key!r} as of {item!r} ({events_nd.shape[0]})"
                raise DataError(f"{self.sequence.name}: expected {expected}, got {values_nd.shape[0]}")
            events_nd = events_nd + project(values_nd)
        return Events(events_nd, reads.row, reads.lengths, target_rd, reads.event, reads.histories)
