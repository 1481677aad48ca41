# SPDX-License-Identifier: Apache-2.0
"""The two batches that models take. Both move, pin and record streams as TorchRec's train pipelines expect."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


class _Batch(Pipelineable):
    """Moves every tensor-like field of a dataclass."""

    def _map(self, name: str, *args: Any, **kwargs: Any) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return type(self)(**{k: None if v is None else getattr(v, name)(*args, **kwargs) for k, v in values.items()})

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The batch on ``device``."""
        return self._map("to", device=device, non_blocking=non_blocking)

    def pin_memory(self) -> Self:
        """The batch in page-locked memory."""
        return self._map("pin_memory")

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory alive until ``stream`` has used it."""
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None:
                value.record_stream(stream)


@dataclass
class RankingBatch(_Batch):
    """B impressions for a ranker, as laid out by an `InputSpec`.

    Attributes:
        sparse: table rows to be pooled, keys ``spec.bag_keys``.
        sequences: table rows to be looked up one by one, keys ``spec.sequence_keys``; histories are oldest first.
        dense: float32 ``[B, len(spec.dense)]``.
        labels: float32 ``[B, len(spec.tasks)]``, or None when serving.
        weights: float32 ``[B]``, at least 0: how much each row counts in the training loss; None where all count alike.
    """

    sparse: KeyedJaggedTensor
    sequences: KeyedJaggedTensor
    dense: Tensor
    labels: Tensor | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return int(self.dense.shape[0])

    def muted(self, last: int) -> Self:
        """The same impressions, of which the ``last`` weigh nothing in a loss."""
        weights = torch.ones(len(self)) if self.weights is None else self.weights.clone()
        weights[len(self) - last :] = 0
        return replace(self, weights=weights)


@dataclass(frozen=True)
class TiledBatch:
    """R candidates of B ≤ R users for a ranker, in which what is a user's is there once.

    Attributes:
        batch: R rows without labels. Under the keys in ``once`` its first B rows hold the users' ids and the others none; under all other
            keys, and in the dense columns, row r holds what belongs to candidate r.
        users: B.
        user_of_row: int64 ``[R]``, the user of each candidate.
        once: the keys that belong to users.
    """

    batch: RankingBatch
    users: int
    user_of_row: Tensor
    once: frozenset[str]

    def __len__(self) -> int:
        return len(self.batch)


@dataclass
class SequenceBatch(_Batch):
    """B histories for a retriever, and the events to predict from their prefixes.

    Events of one user in one second are one step: none of them predicts another. A state of a row is named by the number of events
    that it has seen, 0 to the row's length, and a target is predicted from the state that has seen everything before its step.

    Attributes:
        items: int64 ``[S]`` catalogue rows, oldest first, the histories one after another.
        offsets: int64 ``[B + 1]``: row b holds ``items[offsets[b]:offsets[b + 1]]``.
        targets: int64 ``[M]`` catalogue rows to predict; None when serving.
        target_row: int64 ``[M]``, the row b of each target.
        target_position: int64 ``[M]``, how many events of row b its state has seen.
    """

    items: Tensor
    offsets: Tensor
    targets: Tensor | None = None
    target_row: Tensor | None = None
    target_position: Tensor | None = None

    def __len__(self) -> int:
        return int(self.offsets.shape[0]) - 1

    @property
    def lengths(self) -> Tensor:
        """int64 ``[B]``: the number of events of each history."""
        return self.offsets[1:] - self.offsets[:-1]

    def muted(self, last: int) -> Self:
        """The same histories, of which the ``last`` have nothing to predict."""
        assert self.targets is not None and self.target_row is not None and self.target_position is not None
        kept = self.target_row < len(self) - last
        return replace(self, targets=self.targets[kept], target_row=self.target_row[kept], target_position=self.target_position[kept])
