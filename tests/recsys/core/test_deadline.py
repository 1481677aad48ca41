# SPDX-License-Identifier: Apache-2.0
"""A deadline is a point in time, whatever happens on the way to it."""

import dataclasses

import pytest

from recsys.core import deadline
from recsys.core.deadline import Deadline, RejectReason


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock; its only element may be set."""
    now = [100.0]
    monkeypatch.setattr(deadline.time, "monotonic", lambda: now[0])
    return now


def test_time_runs_out_once(clock: list[float]) -> None:
    due = Deadline.after(0.5)
    assert due.at == 100.5 and due.remaining() == 0.5 and not due.expired
    clock[0] = 100.25
    assert due.remaining() == 0.25 and not due.expired
    clock[0] = 100.5
    assert due.remaining() == 0 and due.expired
    clock[0] = 101.0
    assert due.remaining() == -0.5 and due.expired


def test_a_reserve_ends_earlier_and_leaves_the_deadline_as_it_was(clock: list[float]) -> None:
    due = Deadline.after(1.0)
    earlier = due.reserve(0.25)
    assert earlier.at == 100.75 and due.at == 101.0
    clock[0] = 100.75
    assert earlier.expired and not due.expired


def test_no_time_at_all_is_expired(clock: list[float]) -> None:
    assert Deadline.after(0).expired and Deadline.after(-1).expired


def test_a_deadline_cannot_be_moved() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Deadline.after(1).at = 0.0  # type: ignore[misc]


def test_the_reasons_of_a_rejection_are_a_fixed_set() -> None:
    assert {str(reason) for reason in RejectReason} == {
        "queue_full",
        "deadline_before_start",
        "deadline_in_stage",
        "cancelled",
        "invalid_input",
        "dependency",
        "internal",
        "unauthorized",
        "rate_limited",
    }
