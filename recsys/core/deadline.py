# SPDX-License-Identifier: Apache-2.0
"""Absolute deadlines, set once at the edge and checked at every stage; and the fixed reasons for which a request is rejected."""

import time
from dataclasses import dataclass
from enum import StrEnum


class RejectReason(StrEnum):
    """The fixed set of reasons for which a request gets no full answer."""

    QUEUE_FULL = "queue_full"
    DEADLINE_BEFORE_START = "deadline_before_start"
    DEADLINE_IN_STAGE = "deadline_in_stage"
    CANCELLED = "cancelled"
    INVALID_INPUT = "invalid_input"
    DEPENDENCY = "dependency"
    INTERNAL = "internal"
    UNAUTHORIZED = "unauthorized"
    RATE_LIMITED = "rate_limited"


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point on the monotonic clock, in seconds, after which nobody waits for the answer."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """The deadline ``seconds`` from now."""
        return cls(time.monotonic() + seconds)

    def remaining(self) -> float:
        """Seconds left; negative once expired."""
        return self.at - time.monotonic()

    @property
    def expired(self) -> bool:
        """Whether the time is over."""
        return self.remaining() <= 0

    def reserve(self, seconds: float) -> "Deadline":
        """An earlier deadline that leaves ``seconds`` for what must come after, such as the fallback list."""
        return Deadline(self.at - seconds)
