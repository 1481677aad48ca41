# SPDX-License-Identifier: Apache-2.0
"""From histories to training batches: windows in which all prefixes train at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import torch
from pydantic import Field

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import DataError
from recsys.data.augment import Augmentation, offsets, retell, shown
from recsys.data.batch import SequenceBatch
from recsys.data.cursor import Resumable
from recsys.data.jagged import Jagged, gather, ranges
from recsys.data.sequences import SequenceData, at_least_one, microseconds
from recsys.data.world import World

_ALONE = World()


@dataclass(frozen=True)
class _Windows:
    """W windows: the history ``[start, start + length)`` and the targets ``[offsets[w], offsets[w + 1])`` of each."""

    start: np.ndarray
    length: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray  # [M] events
    position: np.ndarray  # [M] how many events of the window each target's state has seen


def _cut(data: SequenceData, max_length: int, stride: int, first_target: int | None, offset: np.ndarray | None) -> _Windows:
    """Cut every user's events into windows, as `SequenceLoader` documents.

    With an offset for each user, every user has as many windows as the largest offset could need, whatever the offsets are, so that some
    may be empty.
    """
    targets = np.arange(len(data.items)) if first_target is None else np.flatnonzero(data.known_times >= first_target)
    seen, owner = data.seen[targets], data.owner[targets]
    longest = np.diff(data.offsets) - 1  # the most events that a target of the user has seen
    late = np.where(longest > max_length, offset, 0) if offset is not None else np.zeros_like(longest)
    number = np.maximum(0, -(-(seen + late[owner] - max_length) // stride))  # ceil
    most = np.where(longest < 0, 0, 1 + np.maximum(0, -(-(longest - max_length + (stride - 1) * (longest > max_length)) // stride)))
    window = (np.cumsum(most) - most)[owner] + number
    shift = np.where(number > 0, number * stride - late[owner], 0)
    start, length = np.zeros(most.sum(), np.int64), np.zeros(most.sum(), np.int64)
    start[window] = data.offsets[owner] + shift
    np.maximum.at(length, window, seen - shift)
    counts = np.bincount(window, minlength=len(start))
    kept = np.ones(len(start), bool) if offset is not None else counts > 0
    return _Windows(start[kept], length[kept], np.concatenate([[0], np.cumsum(counts[kept])]), targets, seen - shift)


class SequenceLoader(Resumable):
    """Training batches in which every event is a target exactly once in an epoch.

    With L = ``max_length`` and stride h, window j of a user begins at event j · h. A target whose state has seen s events belongs to
    window 0 where s <= L, and to window ceil((s - L) / h) otherwise. So window 0 has all its events as targets, the first event from
    the empty history; a target of a later window is predicted from more than L - h events of context, never more than L; and a window
    is cut off after the last event that one of its targets needs. A window without targets is left out.

    With an `Augmentation` windows begin elsewhere in every epoch: user u's first one is ``offset_u`` events shorter, from 0 to h - 1, and
    the others begin that much earlier. Their number stays the same, so that some may hold nothing. An event that the epoch leaves out
    is neither history nor target.

    The order of windows, and with an augmentation all that it changes, is a function of (seed, epoch), and the cursor counts windows, so
    a loader with a restored cursor goes on exactly where the saved one stood, also in batches of another size and in another number of
    processes. Each of these takes a range of the windows of every batch; where they do not divide, a process repeats one that has nothing
    to predict. It is a `recsys.data.loader.Loader`.

    Args:
        data: the events of the training period (`SequenceData.before`).
        max_length: L, the most events that a model sees.
        batch_size: windows in a batch of all processes together; the last batch of an epoch may be smaller.
        seed: of the order.
        first_target_time: events before it are history only.
        config: see `Config`.
        world: the processes that share every batch. Each tells all histories, and makes batches of its own windows.

    Raises:
        DataError: a size is below 1, the stride is above L, or an augmentation is asked for together with a first target time.
    """

    class Config(BaseConfig):
        """How histories are cut.

        Attributes:
            stride: h, the events from one window to the next; by default half of L, at least 1. A larger one costs less for an epoch,
                since each event is history in L / h windows, and leaves less context at a window's beginning.
            augmentation: how histories vary from epoch to epoch; null for not at all.
            alike: whether a batch holds windows of about the same length, so that little of it is padding where most histories are far
                shorter than L. ``batch_size`` is then a mean: every batch has about as many events, many short windows or a few long ones,
                so that each target weighs as much as in a plain shuffle. Not together with an augmentation, under which lengths change.
        """

        stride: int | None = Field(None, ge=1)
        augmentation: Augmentation | None = None
        alike: bool = False

    def __init__(
        self,
        data: SequenceData,
        max_length: int,
        batch_size: int,
        seed: int,
        first_target_time: datetime | None = None,
        config: Config | None = None,
        world: World = _ALONE,
    ) -> None:
        config = config or self.Config()
        at_least_one(max_length=max_length, batch_size=batch_size)
        self._stride = config.stride or max(1, max_length // 2)
        if self._stride > max_length:
            raise DataError(f"stride: expected at most max_length={max_length}, got {self._stride}")
        if config.augmentation and config.alike:
            raise DataError("alike: expected no augmentation, under which the lengths of windows change from epoch to epoch")
        if config.augmentation and first_target_time:
            raise DataError("augmentation: expected no first_target_time, since reordered histories do not end in their targets")
        self.data, self.max_length, self.batch_size, self.seed, self.world = data, max_length, batch_size, seed, world
        self._augmentation = config.augmentation
        self._first_target = None if first_target_time is None else microseconds(first_target_time)
        self._told: tuple[int, _Told] | None = None
        super().__init__(len(self._tell(0).windows.start))
        self._cuts = _even(np.sort(self._tell(0).windows.length) + 1, batch_size) if config.alike and self.windows else None

    @property
    def windows(self) -> int:
        """The number of windows in an epoch, the same in all."""
        return self._total

    def __len__(self) -> int:
        """The number of batches in a whole epoch."""
        return -(-self.windows // self.batch_size) if self._cuts is None else len(self._cuts) - 1

    def __iter__(self) -> Iterator[SequenceBatch]:
        """The batches of the current epoch, from its beginning, or right after `load_state_dict` from the loaded cursor."""
        begin, told = self._begin(), self._tell(self._epoch)
        for chosen in self._batches(told.windows.length, begin):
            self._samples += len(chosen)
            yield self._share(told, chosen)

    def _share(self, told: "_Told", chosen: np.ndarray) -> SequenceBatch:
        """What this process takes of a batch. Windows that it lacks are the batch's first one, muted."""
        own, lacking = self.world.share(len(chosen))
        batch = told.batch(np.concatenate([chosen[own.start : own.stop], np.repeat(chosen[:1], lacking)]))
        return batch.muted(lacking) if lacking else batch

    def _batches(self, lengths: np.ndarray, begin: int) -> Iterator[np.ndarray]:
        """The windows of each batch of the current epoch that comes after the first ``begin`` windows."""
        random = np.random.default_rng([self.seed, self._epoch])
        order = random.permutation(self.windows)
        if self._cuts is None:
            yield from (order[start : start + self.batch_size] for start in range(begin, self.windows, self.batch_size))
            return
        order = order[np.argsort(lengths[order], kind="stable")]
        done = 0
        for block in random.permutation(len(self._cuts) - 1):
            chosen = order[self._cuts[block] : self._cuts[block + 1]]
            if done < begin < done + len(chosen):
                raise DataError(f"alike: expected to go on with the batch size that the cursor was saved with, got {self.batch_size}")
            if done >= begin:
                yield chosen
            done += len(chosen)

    def _tell(self, epoch: int) -> "_Told":
        """The windows of an epoch; without augmentation those of every epoch."""
        augmentation = self._augmentation
        if self._told and (augmentation is None or self._told[0] == epoch):
            return self._told[1]
        data, kept, late = self.data, None, None
        if augmentation:
            data = retell(data, augmentation, self.seed, epoch)
            late = offsets(data, self._stride, self.seed, epoch)
            kept = shown(len(data.items), augmentation, self.seed, epoch) if augmentation.hide else None
        told = _Told(data.items, _cut(data, self.max_length, self._stride, self._first_target, late), kept)
        self._told = epoch, told
        return told


def _even(costs: np.ndarray, batch_size: int) -> np.ndarray:
    """int64: where blocks of sorted windows begin, and the end, so that windows times the dearest one come to no more than a mean batch."""
    budget = batch_size * float(costs.mean())
    cuts = [0]
    for place, cost in enumerate(costs.tolist()):
        if place > cuts[-1] and (place + 1 - cuts[-1]) * cost > budget:
            cuts.append(place)
    return np.array([*cuts, len(costs)])


@dataclass(frozen=True)
class _Told:
    """The windows of an epoch over its order of items; ``kept`` bool ``[E]`` are the events that the epoch has, None for all."""

    items: np.ndarray
    windows: _Windows
    kept: np.ndarray | None

    def batch(self, chosen: np.ndarray) -> SequenceBatch:
        """The batch of these windows."""
        windows, items = self.windows, self.items
        counts = windows.offsets[chosen + 1] - windows.offsets[chosen]
        targets = ranges(windows.offsets[chosen], counts)
        row = np.repeat(np.arange(len(chosen)), counts)
        if self.kept is not None:
            there = self.kept[windows.targets[targets]]
            targets, row = targets[there], row[there]
        history, position = self._history(chosen, row, windows.position[targets])
        return SequenceBatch(
            items=torch.from_numpy(history.values),
            offsets=torch.from_numpy(history.offsets),
            targets=torch.from_numpy(items[windows.targets[targets]]),
            target_row=torch.from_numpy(row),
            target_position=torch.from_numpy(position),
        )

    def _history(self, chosen: np.ndarray, row: np.ndarray, position: np.ndarray) -> tuple[Jagged, np.ndarray]:
        """The histories of the windows without their hidden events, and how many of those left each target's state has seen."""
        start, length = self.windows.start[chosen], self.windows.length[chosen]
        whole = gather(self.items, start, length)
        if self.kept is None:
            return whole, position
        kept = gather(self.kept, start, length).values
        before = np.concatenate([[0], np.cumsum(kept)])
        first = whole.offsets[row]
        return Jagged(whole.values[kept], before[whole.offsets]), before[first + position] - before[first]
