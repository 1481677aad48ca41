# SPDX-License-Identifier: Apache-2.0
"""The policy of the queue, on a clock of the test's own."""

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from recsys.core.deadline import Deadline, RejectReason
from recsys.inference.request import Request
from serving.engine.entry import Entry
from serving.engine.pace import Pace
from serving.engine.queue import Limits, RowQueue
from serving.engine.work import Rejected, Work

NOW = datetime(2030, 1, 1, tzinfo=UTC)
BUNDLE: Any = "a bundle: the queue only asks whether it is the same"
LIMITS = Limits(batch=2048, waiting=8192, delay=0.002)


def entry(now: float, rows: int = 100, budget: float = 0.12, loaded: Any = BUNDLE) -> Entry:
    request = Request(user_id="u", k=1, at=NOW)
    return Entry(Work(request, Deadline(now + budget), "id"), loaded, rows, None, 0.01, arrived=now)


def queue_of(*entries: Entry, limits: Limits = LIMITS) -> RowQueue:
    queue = RowQueue(limits, Pace())
    for each in entries:
        queue.offer(each, each.arrived)
    return queue


def seconds_of(rows: int) -> float:
    """What a batch takes in these tests: an overhead, and a price for each row."""
    return 0.005 + 2e-5 * rows


def test_a_batch_is_as_many_requests_as_fit_in_their_order() -> None:
    entries = [entry(0.0, rows) for rows in (1000, 1000, 500, 10)]
    queue = queue_of(*entries)
    batch, late = queue.take(0.001)
    assert batch == entries[:2] and not late and queue.rows == 510
    assert queue.take(0.001)[0] == entries[2:] and queue.rows == 0 and len(queue) == 0


def test_what_would_be_late_though_as_small_as_any_of_late_is_refused_unread() -> None:
    queue = RowQueue(LIMITS, Pace())
    for rows in (100, 1000, 2000):
        queue.done(rows, seconds_of(rows))
    queue.check(0.001, 0.0)  # nothing runs: it is tried
    queue.offer(entry(-10.0, 2000, budget=60.0), -10.0)
    queue.take(0.0)
    small = seconds_of(2000) + seconds_of(100)  # once the batch is done, and what it takes then
    for _ in range(64):
        with suppress(Rejected):
            queue.offer(entry(0.0, 100, budget=0.001), 0.0)
    queue.check(small + 1e-6, 0.0)
    with pytest.raises(Rejected, match="it would be ready in"):
        queue.check(small - 1e-6, 0.0)
    queue.offer(entry(0.0, 5, budget=60.0), 0.0)
    queue.check(small - 1e-4, 0.0)
    with pytest.raises(Rejected, match="no time to begin"):
        queue.check(0.0, 0.0)


def test_a_batch_is_of_one_bundle_and_keeps_the_order_within_it() -> None:
    entries = [entry(0.0, loaded=loaded) for loaded in ("one", "two", "one", "two")]
    queue = queue_of(*entries)
    assert queue.take(0.0)[0] == [entries[0], entries[2]]
    assert queue.take(0.0)[0] == [entries[1], entries[3]]


def test_a_request_larger_than_a_batch_has_its_own() -> None:
    large = entry(0.0, 5000)
    assert queue_of(large, entry(0.0)).take(0.0)[0] == [large]


def test_the_first_waits_for_others_no_longer_than_the_delay() -> None:
    queue = queue_of(entry(1.0))
    assert queue.due(1.0) == pytest.approx(0.002)
    queue.offer(entry(1.001), 1.001)
    assert queue.due(1.001) == pytest.approx(0.001)
    assert queue.due(1.5) == 0.0
    queue.offer(entry(1.001, 2000), 1.001)
    assert queue.due(1.001) == 0.0
    assert queue_of().due(1.0) is None


def test_who_has_gone_is_no_longer_counted() -> None:
    stays, goes = entry(0.0), entry(0.0)
    queue = queue_of(goes, stays)
    assert queue.remove(goes) and not queue.remove(goes)
    assert queue.rows == 100 and queue.take(0.0)[0] == [stays]


def test_what_comes_too_late_never_waits_and_what_became_late_is_never_computed() -> None:
    queue = RowQueue(LIMITS, Pace())
    with pytest.raises(Rejected) as rejected:
        queue.offer(entry(0.0, budget=0.1), 0.0951)
    assert rejected.value.reason is RejectReason.DEADLINE_BEFORE_START and rejected.value.status == 504
    queue.offer(waiting := entry(0.0, budget=0.1), 0.0)
    assert queue.take(waiting.cutoff) == ([], [waiting]) and queue.rows == 0


def test_the_queue_is_bounded_in_rows() -> None:
    queue = queue_of(*(entry(0.0, 2000, budget=60.0) for _ in range(4)))
    with pytest.raises(Rejected) as rejected:
        queue.offer(entry(0.0, 200, budget=60.0), 0.0)
    assert rejected.value.reason is RejectReason.QUEUE_FULL and rejected.value.status == 429
    assert rejected.value.retry_after is not None and rejected.value.retry_after >= 1


def test_what_would_be_late_is_rejected_at_once_but_never_while_nothing_runs() -> None:
    queue = RowQueue(LIMITS, Pace())
    for _ in range(20):
        queue.done(2048, 2.0)
    queue.offer(entry(0.0), 0.0)  # nothing else would ever show that it is over
    with pytest.raises(Rejected, match="would be ready in") as rejected:
        queue.offer(entry(0.0, 2000), 0.0)
    assert rejected.value.reason is RejectReason.QUEUE_FULL and rejected.value.retry_after == 2.0
    queue.take(0.002)
    with pytest.raises(Rejected, match="would be ready in"):
        queue.offer(entry(0.01, 2000), 0.01)
    queue.done(100, 0.01)
    queue.offer(entry(0.02, 2000), 0.02)


def test_the_pace_tells_overhead_from_rows() -> None:
    pace, random = Pace(), np.random.default_rng(0)
    assert pace.seconds(100) == 0.0
    for rows in random.integers(50, 2048, 100):
        pace.observe(int(rows), seconds_of(int(rows)) * random.uniform(0.95, 1.05))
    assert pace.seconds(1000) == pytest.approx(seconds_of(1000), rel=0.1)


def test_the_pace_of_equal_batches_is_a_mean_and_follows_a_change() -> None:
    pace = Pace()
    for _ in range(10):
        pace.observe(100, 0.1)
    assert pace.seconds(200) == pytest.approx(0.2)
    for _ in range(200):
        pace.observe(100, 0.01)
    assert pace.seconds(200) == pytest.approx(0.02, rel=0.01)


def served(load: float, seconds: float = 20.0) -> tuple[float, float]:
    """Requests a second that were answered in time, and how late the latest was of those that were let in (negative for in time).

    One server, random arrivals at ``load`` times what full batches could answer.
    """
    random = np.random.default_rng(1)
    capacity = 20 / seconds_of(2000)
    arrivals = np.cumsum(random.exponential(1 / (load * capacity), int(load * capacity * seconds))).tolist()
    pace = Pace()
    for rows in (100, 200, 400, 800, 1600, 2000):  # as the warm-up does
        pace.observe(rows, seconds_of(rows))
    queue, running = RowQueue(LIMITS, pace), None
    now, good, latest, place = 0.0, 0, -np.inf, 0
    while place < len(arrivals) or len(queue) or running:
        arrival = arrivals[place] if place < len(arrivals) else np.inf
        due = None if running else queue.due(now)
        finish, start = running[0] if running else np.inf, np.inf if due is None else now + due
        now = min(arrival, finish, start)
        if running and now == finish:
            queue.done(running[1], seconds_of(running[1]))
            running = None
        elif now == arrival:
            place += 1
            with suppress(Rejected):
                queue.offer(entry(now), now)
        else:
            batch, late = queue.take(now)
            rows = sum(each.rows for each in batch)
            running = (now + seconds_of(rows), rows) if batch else None
            ends = [now - each.work.deadline.at for each in late] + [now + seconds_of(rows) - each.work.deadline.at for each in batch]
            good += sum(end <= 0 for end in ends[len(late) :])
            latest = max(latest, *ends)
    return good / now, latest


def test_three_times_too_many_requests_leave_nine_tenths_of_the_best_goodput() -> None:
    peak = max(served(load)[0] for load in (0.7, 0.9, 1.0, 1.2))
    goodput, latest = served(3.0)
    assert goodput >= 0.9 * peak
    assert latest <= 0, "what is let in is answered in time"
