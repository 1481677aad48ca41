# SPDX-License-Identifier: Apache-2.0
"""From jagged histories to what a transformer takes: right-padded rows, and the distinct states that a batch's targets need."""

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys.core.errors import CannotScoreNewItems, DataError
from recsys.data.batch import SequenceBatch


def pad_last(batch: SequenceBatch, max_length: int) -> tuple[Tensor, Tensor]:
    """The last ``max_length`` events of each history, right-padded.

    Returns:
        int64 ``[B, L]`` catalogue rows, oldest first, filled up with row 0, where L is the longest kept history; and int64 ``[B]``,
        the number of kept events of each row.
    """
    lengths = batch.lengths
    rows = torch.repeat_interleave(torch.arange(len(batch), device=lengths.device), lengths)
    kept = lengths.clamp(max=max_length)
    columns = torch.arange(batch.items.shape[0], device=lengths.device) - batch.offsets[rows] - (lengths - kept)[rows]
    recent = columns >= 0
    padded = batch.items.new_zeros(len(batch), int(kept.max()) if len(batch) else 0)
    padded[rows[recent], columns[recent]] = batch.items[recent]
    return padded, kept


@dataclass(frozen=True)
class TargetStates:
    """The S distinct states from which a batch's M targets are predicted; the targets of one step share one.

    Attributes:
        row: int64 ``[S]``, the history of each state, ascending.
        position: int64 ``[S]``, how many events each state has seen, ascending within a row.
        of_target: int64 ``[M]``, the state of each target.
    """

    row: Tensor
    position: Tensor
    of_target: Tensor

    def padded(self, rows: int) -> tuple[Tensor, Tensor]:
        """The states laid out by row: int64 ``[rows, P]`` positions, filled up with 0, and int64 ``[S]``, the column of each state."""
        counts = torch.bincount(self.row, minlength=rows)
        firsts = counts.cumsum(0) - counts
        column = torch.arange(self.row.shape[0], device=self.row.device) - firsts[self.row]
        positions = self.position.new_zeros(rows, int(counts.max()) if rows else 0)
        positions[self.row, column] = self.position
        return positions, column


def require_targets(batch: SequenceBatch, max_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The targets of a batch to train on, their rows and their positions, int64 ``[M]`` each.

    Raises:
        DataError: there are no targets, a row is longer than ``max_length``, or a target's state lies outside its history.
    """
    if batch.targets is None or batch.target_row is None or batch.target_position is None:
        raise DataError("loss: the batch has no targets: targets, target_row and target_position are all needed")
    lengths = batch.lengths
    if bool((lengths > max_length).any()):
        row = int(lengths.argmax())
        raise DataError(f"loss: row {row} has {int(lengths[row])} events, expected at most max_length={max_length}: cut it into windows")
    rows, positions = batch.target_row, batch.target_position
    outside = (rows < 0) | (rows >= len(batch))
    outside |= (positions < 0) | (positions > lengths[rows.masked_fill(outside, 0)])
    if bool(outside.any()):
        m = int(outside.long().argmax())
        raise DataError(
            f"loss: target {m} has target_row={int(rows[m])}, target_position={int(positions[m])}: outside its history "
            f"(the batch has {len(batch)} rows)"
        )
    return batch.targets, rows, positions


def training_targets(batch: SequenceBatch, max_length: int, known: Tensor | None) -> tuple[Tensor, TargetStates]:
    """The targets to train on and their states.

    Args:
        batch: histories of at most ``max_length`` events, with targets.
        max_length: the model's window.
        known: bool ``[N]``, the items that are candidates of the softmax; a target outside them is left out. None keeps all.

    Returns:
        int64 ``[M']`` the targets kept, and their `TargetStates`.

    Raises:
        DataError: there are no targets, a row is longer than ``max_length``, or a target's state lies outside its history.
    """
    targets, rows, positions = require_targets(batch, max_length)
    if known is not None:
        keep = known[targets]
        targets, rows, positions = targets[keep], rows[keep], positions[keep]
    states, of_target = torch.unique(rows * (max_length + 1) + positions, return_inverse=True)
    return targets, TargetStates(states // (max_length + 1), states % (max_length + 1), of_target)


def known_histories(batch: SequenceBatch, max_length: int, count: int) -> tuple[Tensor, Tensor]:
    """`pad_last` of a batch that names rows 0 to ``count`` - 1 only.

    Raises:
        CannotScoreNewItems: a history or a target holds another row.
    """
    require_known_rows(batch, count)
    return pad_last(batch, max_length)


def after_all(states_bld: Tensor, lengths: Tensor) -> Tensor:
    """The last state ``[B, …]`` of each row, which has seen ``lengths`` events, of its states ``[B, L + 1, …]`` after 0, 1, … L events."""
    return states_bld[torch.arange(len(lengths), device=lengths.device), lengths]


def require_known_rows(batch: SequenceBatch, count: int) -> None:
    """Check that the batch names rows 0 to ``count`` - 1 only.

    Raises:
        CannotScoreNewItems: a history or a target holds another row.
    """
    for name, rows in (("items", batch.items), ("targets", batch.targets)):
        if rows is not None and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
            wrong = rows[(rows < 0) | (rows >= count)][0]
            raise CannotScoreNewItems(f"{name}: row {int(wrong)}: the model knows the catalogue rows 0 to {count - 1} only")
