# SPDX-License-Identifier: Apache-2.0
"""The policy of the queue: who is let in, who waits, who computes together. No threads and no clock of its own."""

import math
from collections import deque
from dataclasses import dataclass

from recsys.core.deadline import RejectReason
from serving.engine.entry import Entry
from serving.engine.pace import Arrivals, Pace
from serving.engine.work import Rejected

_RECENT = 64  # requests


@dataclass(frozen=True)
class Limits:
    """Sizes are in rows: candidates of all requests together.

    Attributes:
        batch: of a batch at most. A request that is larger has a batch of its own.
        waiting: of all that wait.
        delay: seconds that the first request of a batch waits for others.
    """

    batch: int
    waiting: int
    delay: float


class RowQueue:
    """First in, first out, in batches of one bundle. ``now`` is in monotonic seconds; callers take turns.

    Args:
        limits: see `Limits`.
        pace: predicts how long rows take.
    """

    def __init__(self, limits: Limits, pace: Pace) -> None:
        self.limits, self.pace = limits, pace
        self._waiting: list[Entry] = []
        self._fills: list[int] = []
        self._arrivals = Arrivals()
        self._sizes: deque[int] = deque(maxlen=_RECENT)
        self._busy_until = 0.0
        self._busy = False
        self.rows = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, entry: Entry, now: float) -> None:
        """Let a request wait.

        Raises:
            Rejected: it is too late already (``deadline_before_start``), or the queue is full or would make it late (``queue_full``).
        """
        self._sizes.append(entry.rows)
        self._check(entry.rows, entry.cutoff, now)
        self._waiting.append(entry)
        self._fill(self._fills, entry.rows)
        self.rows += entry.rows
        self._arrivals.add(entry.rows, now)

    def check(self, cutoff: float, now: float) -> None:
        """Whether a request may be read for which no stage begins after ``cutoff``: it is taken to be as small as the smallest of late.

        Raises:
            Rejected: see `offer`.
        """
        self._check(min(self._sizes, default=1), cutoff, now)

    def _check(self, rows: int, cutoff: float, now: float) -> None:
        if now >= cutoff:
            raise Rejected(RejectReason.DEADLINE_BEFORE_START, "the deadline leaves no time to begin")
        ready = self._ready(rows, now)
        if self._waiting and self.rows + rows > self.limits.waiting:
            raise Rejected(RejectReason.QUEUE_FULL, f"{self.rows} candidates wait already", _whole(ready - now))
        # Where nothing waits or runs it is tried, however slow the last batches were: else nothing would ever show that this is over.
        if (self._busy or self._waiting) and ready > cutoff:
            left = 1000 * (cutoff - now)
            message = f"it would be ready in {1000 * (ready - now):.0f} ms, but only {left:.0f} ms are left"
            raise Rejected(RejectReason.QUEUE_FULL, message, _whole(ready - cutoff))

    def remove(self, entry: Entry) -> bool:
        """Take out a request whose client has gone; whether it was still waiting."""
        if entry not in self._waiting:
            return False
        self._waiting.remove(entry)
        self._refill()
        return True

    def due(self, now: float) -> float | None:
        """Seconds until a batch should be formed, 0 for at once; None while nobody waits."""
        if not self._waiting:
            return None
        if self.rows >= self.limits.batch:
            return 0.0
        return max(0.0, self._waiting[0].arrived + self.limits.delay - now)

    def take(self, now: float) -> tuple[list[Entry], list[Entry]]:
        """The next batch, of the bundle of whoever waits longest, and those for whom it is too late; neither waits any more."""
        late = [entry for entry in self._waiting if now >= entry.cutoff]
        kept = [entry for entry in self._waiting if now < entry.cutoff]
        batch: list[Entry] = []
        rows = 0
        for entry in kept:
            if entry.loaded is kept[0].loaded:
                if batch and rows + entry.rows > self.limits.batch:
                    break
                batch.append(entry)
                rows += entry.rows
        taken = set(map(id, batch))
        self._waiting = [entry for entry in kept if id(entry) not in taken]
        self._refill()
        if batch:
            self._busy, self._busy_until = True, now + self.pace.seconds(rows)
        return batch, late

    def done(self, rows: int, seconds: float) -> None:
        """The batch of ``rows`` that was taken last took so long."""
        self._busy = False
        self.pace.observe(rows, seconds)

    def _ready(self, rows: int, now: float) -> float:
        """When a request that came now would be answered.

        Its batch is as late as the last request in it: those count as well that will come before the batch begins.
        """
        fills = list(self._fills)
        self._fill(fills, rows)
        begins = now + (max(0.0, self._busy_until - now) if self._busy else 0.0) + sum(map(self.pace.seconds, fills[:-1]))
        coming = self._arrivals.rate(now) * (begins - now)
        return begins + self.pace.seconds(max(fills[-1], min(self.limits.batch, round(fills[-1] + coming))))

    def _fill(self, fills: list[int], rows: int) -> None:
        """Add a request to the batches that those before it will be in."""
        if fills and fills[-1] + rows <= self.limits.batch:
            fills[-1] += rows
        else:
            fills.append(rows)

    def _refill(self) -> None:
        self._fills = []
        for entry in self._waiting:
            self._fill(self._fills, entry.rows)
        self.rows = sum(self._fills)


def _whole(seconds: float) -> float:
    """Whole seconds, at least 1, as ``Retry-After`` has them."""
    return float(max(1, math.ceil(seconds)))
