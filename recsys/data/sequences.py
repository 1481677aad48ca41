# SPDX-License-Identifier: Apache-2.0
"""Histories: ordered events by user, and the states in which a period's events are predicted.

Events of one user in one second are one *step*: none of them predicts another, so the state that predicts an event has seen exactly
the events of the earlier steps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recsys.core.errors import DataError, unknown
from recsys.core.schema import EVENT_TIME, ITEM, TIME, USER
from recsys.data.batch import SequenceBatch
from recsys.data.jagged import Jagged, gather
from recsys.data.splits import STEP

_SECOND = 1_000_000  # microseconds


@dataclass(frozen=True, eq=False)
class SequenceData:
    """The events of U users, one user after another, oldest first.

    Attributes:
        users: string ``[U]``.
        offsets: int64 ``[U + 1]``: user u has the events ``offsets[u]`` to ``offsets[u + 1]``.
        items: int64 ``[E]`` catalogue rows.
        steps: int64 ``[E]``: equal for two events of a user that are of one step.
        times: int64 ``[E]``, microseconds since 1970; None where only the order of events is known.
    """

    users: pa.StringArray
    offsets: np.ndarray
    items: np.ndarray
    steps: np.ndarray
    times: np.ndarray | None = None

    @classmethod
    def from_order(cls, users: Sequence[str], histories: Jagged) -> "SequenceData":
        """Events of which only the order is known; each is a step of its own.

        Args:
            users: the id of each.
            histories: for each user the catalogue rows, oldest first.

        Raises:
            DataError: there is not one history for each user.
        """
        offsets = np.asarray(histories.offsets, np.int64)
        if len(offsets) != len(users) + 1:
            raise DataError(f"histories: expected one for each of {len(users)} users, got {len(offsets) - 1}")
        items = np.asarray(histories.values, np.int64)
        return cls(pa.array(users, pa.string()), offsets, items, np.arange(len(items)))

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

    @property
    def known_times(self) -> np.ndarray:
        """``times``, where there are any.

        Raises:
            DataError: only the order of the events is known.
        """
        if self.times is None:
            raise DataError("events: only their order is known, and this needs their times; `leave_one_out` does without")
        return self.times

    def occurring(self, count: int) -> np.ndarray:
        """bool ``[count]``: which rows of a catalogue of so many have events."""
        found = np.zeros(count, bool)
        found[self.items] = True
        return found

    def before(self, time: datetime) -> "SequenceData":
        """The events before ``time``; users stay, also those left without any."""
        return self.where(self.known_times < microseconds(time))

    def where(self, kept: np.ndarray) -> "SequenceData":
        """The events for which bool ``kept [E]`` is true; users stay, also those left without any."""
        offsets = np.concatenate([[0], np.cumsum(kept)])[self.offsets]
        times = None if self.times is None else self.times[kept]
        return SequenceData(self.users, offsets, self.items[kept], self.steps[kept], times)


def _check_order(codes: np.ndarray, steps: np.ndarray, times: np.ndarray, users: pa.StringArray) -> None:
    """Within a user: seconds never fall, and the step changes exactly where the second does."""
    same_user = codes[1:] == codes[:-1]
    seconds = np.diff(times // _SECOND)
    wrong = same_user & ((seconds < 0) | ((seconds > 0) != (np.diff(steps) > 0)) | (np.diff(steps) < 0))
    if wrong.any():
        user = users[int(codes[int(np.argmax(wrong))])].as_py()
        raise DataError(f"events: those of user {user!r} are not in the order of their seconds and steps: order_events gives it")


@dataclass(frozen=True, eq=False)
class EvaluationSteps:
    """The S distinct (user, second) steps of a period, in the order of users, then time.

    Attributes:
        user_id: string ``[S]``.
        request_time: timestamp[us, UTC] ``[S]``: the second less 1 µs, so that features know nothing of it; null where there are no times.
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

    def sample(self, count: int, seed: int | Sequence[int]) -> "EvaluationSteps":
        """``count`` of the steps, drawn by seed, in their order; all where there are no more."""
        if len(self) <= count:
            return self
        return self.take(np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False)))

    def take(self, places: np.ndarray) -> "EvaluationSteps":
        """The steps at these places, int64, in their order."""
        offsets = self.targets.offsets
        return EvaluationSteps(
            user_id=self.user_id.take(pa.array(places)),
            request_time=self.request_time.take(pa.array(places)),
            start=self.start[places],
            event=self.event[places],
            targets=gather(self.targets.values, offsets[places], np.diff(offsets)[places]),
        )


def evaluation_steps(data: SequenceData, from_time: datetime, to_time: datetime | None = None) -> EvaluationSteps:
    """The steps with events in ``[from_time, to_time)``, to the last event where no end is given. Targets are in the order of the events.

    An earlier event of a second that ``from_time`` cuts is neither a target nor part of the step's history.
    """
    chosen = data.known_times >= microseconds(from_time)
    if to_time is not None:
        chosen &= data.known_times < microseconds(to_time)
    events = np.flatnonzero(chosen)
    start = data.offsets[data.owner[events]]
    event, first = np.unique(start + data.seen[events], return_index=True)  # ascending already: one entry for each step
    return EvaluationSteps(
        user_id=data.users.take(pa.array(data.owner[event])),
        request_time=request_times(data.known_times[event]),
        start=start[first],
        event=event,
        targets=Jagged(data.items[events], np.append(first, len(events))),
    )


def request_times(times: np.ndarray) -> pa.TimestampArray:
    """When the events of these times are asked for: their second less 1 µs, so that nothing of it is known."""
    return pa.array(times // _SECOND * _SECOND - 1, pa.int64()).cast(TIME)


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
    at_least_one(max_length=max_length, chunk=chunk)
    for begin in range(0, len(steps), chunk):
        start, event = steps.start[begin : begin + chunk], steps.event[begin : begin + chunk]
        length = np.minimum(event - start, max_length)
        recent = gather(data.items, event - length, length)
        batch = SequenceBatch(items=torch.from_numpy(recent.values), offsets=torch.from_numpy(recent.offsets))
        yield batch, gather(data.items, start, event - start)


def at_least_one(**values: int) -> None:
    """Hold that each of the named values is at least 1."""
    for name, value in values.items():
        if value < 1:
            raise DataError(f"{name}: expected at least 1, got {value}")


def microseconds(time: datetime) -> int:
    """Microseconds since 1970 of a time with a zone."""
    if time.tzinfo is None:
        raise DataError(f"time: expected a time with a zone, got {time.isoformat()}")
    return int(pa.scalar(time, TIME).value)
