# SPDX-License-Identifier: Apache-2.0
"""The split of much of the literature, for comparison with it: every user's last event tests, the one before validates."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from recsys.core.schema import TIME
from recsys.data.jagged import Jagged
from recsys.data.sequences import EvaluationSteps, SequenceData, request_times


class LeaveOneOut(NamedTuple):
    """LEAKY: the training events of one user happen after the test events of another. See `leave_one_out`.

    Attributes:
        train: all but the last two events of each user; users stay, also those left without any.
        valid: the last event but one, after all before it.
        test: the last event, after all before it.
    """

    train: SequenceData
    valid: EvaluationSteps
    test: EvaluationSteps


def leave_one_out(data: SequenceData) -> LeaveOneOut:
    """Split histories. Users with fewer than three events are trained on with all they have, and neither validated nor tested.

    Where times are known, the events of one step (a second) come in the order that `recsys.data.splits.order_events` drew by its seed; the
    published protocols take whatever order a file has, which for stamps of whole days leaks (papers/retrieval.md, §5.2). As they do, a
    history holds all events before the last one, those of its own step included.
    """
    lengths = np.diff(data.offsets)
    tested = np.flatnonzero(lengths >= 3)
    ends = data.offsets[1:][tested]
    kept = np.ones(len(data.items), bool)
    kept[ends - 1] = kept[ends - 2] = False
    return LeaveOneOut(data.where(kept), *(_steps(data, tested, ends - back) for back in (2, 1)))


def hold_out(split: LeaveOneOut, items: np.ndarray) -> LeaveOneOut:
    """A split in which these catalogue rows are new: nothing of them is in the training period, and they decide nothing in validation.

    They stay in the histories before test events and among those, so that one test period says how well old and new items are found.

    Args:
        split: of all items.
        items: int64, the rows.
    """
    valid = np.flatnonzero(~np.isin(split.valid.targets.values, items))
    return LeaveOneOut(split.train.where(~np.isin(split.train.items, items)), split.valid.take(valid), split.test)


def _steps(data: SequenceData, users: np.ndarray, events: np.ndarray) -> EvaluationSteps:
    """One step for each of the users: its target is the given event."""
    request = pa.nulls(len(users), TIME) if data.times is None else request_times(data.times[events])
    return EvaluationSteps(
        user_id=data.users.take(pa.array(users)),
        request_time=request,
        start=data.offsets[users],
        event=events,
        targets=Jagged(data.items[events], np.arange(len(events) + 1)),
    )
