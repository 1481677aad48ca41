# SPDX-License-Identifier: Apache-2.0
"""Histories: from ordered events to training windows, and to the states in which a period's events are predicted.

Events of one user in one second are one *step*: none of them predicts another, so the state that predicts an event has seen exactly
the events of the earlier steps.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recsys.core.errors import CheckpointError, DataError, unknown
from recsys.core.schema import EVENT_TIME, ITEM, TIME, USER
from recsys.data.batch import SequenceBatch
from recsys.data.splits import STEP

_SECOND = 1_000_000  # microseconds


class Jagged(NamedTuple):
    """Lists of int64: list b holds ``values[offsets[b]:offsets[b + 1]]``."""

    values: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True, eq=False)
class SequenceData:
    """The events of U users, one user after another, oldest first.

    Attributes:
        users: string ``[U]``.
        offsets: int64 ``[U + 1]``: user u has the events ``offsets[u]`` to ``offsets[u + 1]``.
        items: int64 ``[E]`` catalogue rows.
        steps: int64 ``[E]``: equal for two events of a user that are of one step.
        times: int64 ``[E]``, microseconds since 1970.
    """

    users: pa.StringArray
    offsets: np.ndarray
    items: np.ndarray
    steps: np.ndarray
    times: np.ndarray

    @classmethod
    def from_events(cls, ordered: pa.Table, rows: Callable[[pa.ChunkedArray], np.ndarray]) -> "SequenceData":
        """Take over events that `recsys.data.splits.order_events` has ordered.

        Args:
            ordered: ``user_id``, ``item_id``, ``event_time`` and ``step``; each user's events stand together, in the order of their
                steps, which are seconds.
            rows: from item ids to catalogue rows, -1 for unknown ones: a catalogue's method ``rows``.

        Raises:
            DataError: a column is absent, the events are not in that order, or an item is not in the catalogue.
        """
        for name in (USER, ITEM, EVENT_TIME, STEP):
            if name not in ordered.column_names:
                raise DataError(f"events: missing column: {unknown('column', name, ordered.column_names)}")
            if ordered[name].null_count:
                raise DataError(f"events: column {name!r}: expected no null, got {ordered[name].null_count}")
        items = np.asarray(rows(ordered[ITEM]), np.int64)
        if (items < 0).any():
            strangers = pc.unique(ordered[ITEM].filter(pa.array(items < 0)))
            raise DataError(f"events: {len(strangers)} items are not in the catalogue, such as {strangers[0].as_py()!r}")
        encoded = ordered[USER].combine_chunks().dictionary_encode()
        codes = encoded.indices.to_numpy()
        starts = np.flatnonzero(np.diff(codes, prepend=-1))
        if len(starts) != len(encoded.dictionary):
            raise DataError(f"events: expected each user's together, but {len(encoded.dictionary)} users have {len(starts)} runs")
        offsets = np.append(starts, len(codes)).astype(np.int64)
        steps = ordered[STEP].to_numpy().astype(np.int64)
        times = ordered[EVENT_TIME].cast(TIME).cast(pa.int64()).to_numpy()
        _check_order(codes, steps, times, encoded.dictionary)
        return cls(encoded.dictionary, offsets, items, steps, times)

    @cached_property
    def owner(self) -> np.ndarray:
        """int64 ``[E]``: the user of each event."""
        return np.repeat(np.arange(len(self.users)), np.diff(self.offsets))

    @cached_property
    def seen(self) -> np.ndarray:
        """int64 ``[E]``: how many events of its user are in earlier steps than the event's own."""
        place = np.arange(len(self.items))
        user_start = self.offsets[self.owner]
        first = place == user_start
        first[1:] |= self.steps[1:] != self.steps[:-1]
        seen: np.ndarray = np.maximum.accumulate(np.where(first, place, 0)) - user_start
        return seen

    def before(self, time: datetime) -> "SequenceData":
        """The events before ``time``; users stay, also those left without any."""
        kept = self.times < _micros(time)
        offsets = np.concatenate([[0], np.cumsum(kept)])[self.offsets]
        return SequenceData(self.users, offsets, self.items[kept], self.steps[kept], self.times[kept])


def _check_order(codes: np.ndarray, steps: np.ndarray, times: np.ndarray, users: pa.StringArray) -> None:
    """Within a user: seconds never fall, and the step changes exactly where the second does."""
    same_user = codes[1:] == codes[:-1]
    seconds = np.diff(times // _SECOND)
    wrong = same_user & ((seconds < 0) | ((seconds > 0) != (np.diff(steps) > 0)) | (np.diff(steps) < 0))
    if wrong.any():
        user = users[int(codes[int(np.argmax(wrong))])].as_py()
        raise DataError(f"events: those of user {user!r} are not in the order of their seconds and steps: order_events gives it")


@dataclass(frozen=True)
class _Windows:
    """W windows: the history ``[start, start + length)`` and the targets ``[offsets[w], offsets[w + 1])`` of each."""

    start: np.ndarray
    length: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray  # [M] events
    position: np.ndarray  # [M] how many events of the window each target's state has seen


def _cut(data: SequenceData, max_length: int, first_target: int | None) -> _Windows:
    """Cut every user's events into windows, as `SequenceLoader` documents."""
    targets = np.arange(len(data.items)) if first_target is None else np.flatnonzero(data.times >= first_target)
    stride = max(1, max_length // 2)
    seen, owner = data.seen[targets], data.owner[targets]
    number = np.maximum(0, -(-(seen - max_length) // stride))  # ceil
    new = np.ones(len(targets), bool)
    new[1:] = (owner[1:] != owner[:-1]) | (number[1:] != number[:-1])
    first = np.flatnonzero(new)
    offsets = np.append(first, len(targets))
    shift = number * stride
    last = offsets[1:] - 1  # `seen` never falls within a user, so the last target of a window has the longest history
    return _Windows(
        start=(data.offsets[owner] + shift)[first],
        length=(seen - shift)[last],
        offsets=offsets,
        targets=targets,
        position=seen - shift,
    )


class SequenceLoader:
    """Training batches in which every event is a target exactly once in an epoch.

    With L = ``max_length`` and stride h = max(1, floor(L / 2)), window j of a user begins at event j · h. A target whose state has
    seen s events belongs to window 0 where s <= L, and to window ceil((s - L) / h) otherwise. So window 0 has all its events as
    targets, the first event from the empty history; a target of a later window is predicted from more than L / 2 events of context,
    never more than L; and a window is cut off after the last event that one of its targets needs. A window without targets is left out.

    The order of windows is a function of (seed, epoch), and the cursor counts windows, so a loader with a restored cursor goes on exactly
    where the saved one stood, also in batches of another size. It is a `recsys.data.loader.Loader`.

    Args:
        data: the events of the training period (`SequenceData.before`).
        max_length: L, the most events that a model sees.
        batch_size: windows in a batch; the last batch of an epoch may be smaller.
        seed: of the order.
        first_target_time: events before it are history only.
    """

    def __init__(self, data: SequenceData, max_length: int, batch_size: int, seed: int, first_target_time: datetime | None = None) -> None:
        _at_least_one(max_length=max_length, batch_size=batch_size)
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self._windows = _cut(data, max_length, None if first_target_time is None else _micros(first_target_time))
        self._epoch = 0
        self._samples = 0
        self._resume = 0

    @property
    def windows(self) -> int:
        """The number of windows in an epoch."""
        return len(self._windows.start)

    def __len__(self) -> int:
        """The number of batches in a whole epoch."""
        return -(-self.windows // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the order. The cursor goes back to 0 unless this is the current epoch already."""
        if epoch != self._epoch:
            self._epoch, self._samples, self._resume = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """The cursor ``{"epoch", "samples"}``: the epoch, and how many windows of it have been handed out."""
        return {"epoch": self._epoch, "samples": self._samples}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a saved cursor: the next iteration yields exactly the batches that were left.

        Raises:
            CheckpointError: it is not a cursor of these data.
        """
        epoch, samples = state.get("epoch"), state.get("samples")
        if not (isinstance(epoch, int) and epoch >= 0 and isinstance(samples, int) and 0 <= samples <= self.windows):
            raise CheckpointError(f"cursor: expected epoch >= 0 and samples from 0 to {self.windows}, got {dict(state)!r}")
        self._epoch, self._samples, self._resume = epoch, samples, samples

    def __iter__(self) -> Iterator[SequenceBatch]:
        """The batches of the current epoch, from its beginning, or right after `load_state_dict` from the loaded cursor."""
        self._samples, self._resume = self._resume, 0
        order = np.random.default_rng([self.seed, self._epoch]).permutation(self.windows)
        for start in range(self._samples, self.windows, self.batch_size):
            chosen = order[start : start + self.batch_size]
            self._samples = start + len(chosen)
            yield self._batch(chosen)

    def _batch(self, chosen: np.ndarray) -> SequenceBatch:
        windows, items = self._windows, self.data.items
        history = _gather(items, windows.start[chosen], windows.length[chosen])
        counts = windows.offsets[chosen + 1] - windows.offsets[chosen]
        targets = _ranges(windows.offsets[chosen], counts)
        return SequenceBatch(
            items=torch.from_numpy(history.values),
            offsets=torch.from_numpy(history.offsets),
            targets=torch.from_numpy(items[windows.targets[targets]]),
            target_row=torch.from_numpy(np.repeat(np.arange(len(chosen)), counts)),
            target_position=torch.from_numpy(windows.position[targets]),
        )


@dataclass(frozen=True, eq=False)
class EvaluationSteps:
    """The S distinct (user, second) steps of a period, in the order of users, then time.

    Attributes:
        user_id: string ``[S]``.
        request_time: timestamp[us, UTC] ``[S]``: the second less 1 µs, so that features know nothing of it.
        start: int64 ``[S]``: the first event of the user.
        event: int64 ``[S]``: the first event of the step; the user's events from ``start`` to before it are the history.
        targets: the catalogue rows of the step's events within the period.
    """

    user_id: pa.StringArray
    request_time: pa.TimestampArray
    start: np.ndarray
    event: np.ndarray
    targets: Jagged

    def __len__(self) -> int:
        return len(self.event)

    def take(self, places: np.ndarray) -> "EvaluationSteps":
        """The steps at these places, int64, in their order."""
        offsets = self.targets.offsets
        return EvaluationSteps(
            user_id=self.user_id.take(pa.array(places)),
            request_time=self.request_time.take(pa.array(places)),
            start=self.start[places],
            event=self.event[places],
            targets=_gather(self.targets.values, offsets[places], np.diff(offsets)[places]),
        )


def evaluation_steps(data: SequenceData, from_time: datetime, to_time: datetime | None = None) -> EvaluationSteps:
    """The steps with events in ``[from_time, to_time)``, to the last event where no end is given. Targets are in the order of the events.

    An earlier event of a second that ``from_time`` cuts is neither a target nor part of the step's history.
    """
    chosen = data.times >= _micros(from_time)
    if to_time is not None:
        chosen &= data.times < _micros(to_time)
    events = np.flatnonzero(chosen)
    start = data.offsets[data.owner[events]]
    event, first = np.unique(start + data.seen[events], return_index=True)  # ascending already: one entry for each step
    request = data.times[event] // _SECOND * _SECOND - 1
    return EvaluationSteps(
        user_id=data.users.take(pa.array(data.owner[event])),
        request_time=pa.array(request, pa.int64()).cast(TIME),
        start=start[first],
        event=event,
        targets=Jagged(data.items[events], np.append(first, len(events))),
    )


def histories(data: SequenceData, steps: EvaluationSteps, max_length: int, chunk: int) -> Iterator[tuple[SequenceBatch, Jagged]]:
    """What was known before each step, ``chunk`` steps at a time and in their order.

    Args:
        data: the events that the steps are of.
        steps: from `evaluation_steps`.
        max_length: the longest history in a batch.
        chunk: steps at a time.

    Yields:
        The last ``max_length`` catalogue rows before each step, without targets; and all catalogue rows before it (with repeats), to
        be excluded from what is recommended.

    Raises:
        DataError: ``max_length`` or ``chunk`` is below 1.
    """
    _at_least_one(max_length=max_length, chunk=chunk)
    for begin in range(0, len(steps), chunk):
        start, event = steps.start[begin : begin + chunk], steps.event[begin : begin + chunk]
        length = np.minimum(event - start, max_length)
        recent = _gather(data.items, event - length, length)
        batch = SequenceBatch(items=torch.from_numpy(recent.values), offsets=torch.from_numpy(recent.offsets))
        yield batch, _gather(data.items, start, event - start)


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise DataError(f"{name}: expected at least 1, got {value}")


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 ``[Σ lengths]``: the integers ``starts[i]`` to ``starts[i] + lengths[i] - 1``, one range after another."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _gather(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Jagged:
    """The slices ``values[starts[i]:starts[i] + lengths[i]]``."""
    return Jagged(values[_ranges(starts, lengths)], np.concatenate([[0], np.cumsum(lengths)]))


def _micros(time: datetime) -> int:
    """Microseconds since 1970 of a time with a zone."""
    if time.tzinfo is None:
        raise DataError(f"time: expected a time with a zone, got {time.isoformat()}")
    return int(pa.scalar(time, TIME).value)
