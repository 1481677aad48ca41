# SPDX-License-Identifier: Apache-2.0
"""The interface of history encoders: a jagged history and a candidate become one or more field vectors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import DataError
from recsys.data.spec import SequenceSpec
from recsys.efficiency.history import HistoryPruning
from recsys.efficiency.view import TokenView, offsets_of


@dataclass(frozen=True)
class Events:
    """The N events of B histories, and the candidates that they are read for.

    Attributes:
        vectors: ``[N, d]``, one history after another, oldest first.
        row: int64 ``[N]``, the row of each event.
        lengths: int ``[B]``, the events of each row.
        target: ``[B, d]``, the candidate's vector.
    """

    vectors: Tensor
    row: Tensor
    lengths: Tensor
    target: Tensor


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

    @abstractmethod
    def encode(self, events: Events) -> Tensor:
        """``[B, n, d]``; a row without events gets a result all the same."""

    def pruned(self, events: Events) -> Events:
        """The events that are read."""
        if self.pruning is None:
            return events
        view = TokenView.of(events.vectors, offsets_of(events.lengths.long()), context=events.target[:, None])
        kept = self.pruning(view)
        return Events(kept.gather(events.vectors), kept.gather(events.row), kept.lengths.to(events.lengths.dtype), events.target)

    def events(self, sequences: Mapping[str, JaggedTensor]) -> Events:
        """The vectors of all events, and what belongs to them."""
        item, *extras = self.sequence.keys
        lengths_b, target_bd = sequences[item].lengths(), sequences[self.sequence.target].values()
        if target_bd.shape[0] != lengths_b.shape[0]:
            expected = f"one {self.sequence.target!r} for each of {lengths_b.shape[0]} rows"
            raise DataError(f"{self.sequence.name}: expected {expected}, got {target_bd.shape[0]}")
        events_nd: Tensor = sequences[item].values()
        for key, project in zip(extras, self.extras, strict=True):
            values_nd = sequences[key].values()
            if values_nd.shape[0] != events_nd.shape[0]:
                expected = f"as many values of {key!r} as of {item!r} ({events_nd.shape[0]})"
                raise DataError(f"{self.sequence.name}: expected {expected}, got {values_nd.shape[0]}")
            events_nd = events_nd + project(values_nd)
        row_n = torch.repeat_interleave(lengths_b.long(), output_size=events_nd.shape[0])
        return Events(events_nd, row_n, lengths_b, target_bd)
