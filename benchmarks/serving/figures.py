# SPDX-License-Identifier: Apache-2.0
"""What outcomes of requests come to: goodput, percentiles, shares; and where the knee of a sweep over rates is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.serving.load import NO_ANSWER

ANSWERED = 200


@dataclass(frozen=True)
class Step:
    """One offered rate.

    Attributes:
        seconds: how long requests were due.
        latency: float64 ``[n]``, seconds from when each was due.
        status: int64 ``[n]``.
        lesser: bool ``[n]``, see `benchmarks.serving.load.Outcomes`.
        lag: the 99th percentile of how late the generator sent, in seconds; 0 where it does not say.
    """

    seconds: float
    latency: np.ndarray
    status: np.ndarray
    lesser: np.ndarray
    lag: float = 0.0

    @classmethod
    def of(cls, outcomes: dict[str, Any]) -> "Step":
        """From what the generator answers."""
        lag = outcomes["lag"]
        return cls(
            outcomes["seconds"],
            np.asarray(outcomes["latency"], np.float64),
            np.asarray(outcomes["status"], np.int64),
            np.asarray(outcomes["lesser"], bool),
            float(np.percentile(lag, 99)) if lag else 0.0,
        )

    @property
    def offered(self) -> float:
        """Requests a second."""
        return len(self.status) / self.seconds

    @property
    def answered(self) -> np.ndarray:
        """bool ``[n]``: whether the status is 200."""
        found: np.ndarray = self.status == ANSWERED
        return found

    def goodput(self, deadline_ms: float, *, lesser: bool = False) -> float:
        """Answers with status 200 within the deadline, a second; lesser ones, such as lists without the ranker, only where it is said."""
        good = self.answered & (self.latency <= deadline_ms / 1000)
        return float(np.count_nonzero(good if lesser else good & ~self.lesser) / self.seconds)

    def percentile(self, percent: float) -> float:
        """Of the latencies of those with status 200, in milliseconds; infinite where there is none."""
        found = self.latency[self.answered]
        return float(np.percentile(found, percent)) * 1000 if len(found) else float("inf")

    @property
    def rejected(self) -> float:
        """The share of answers with another status than 200."""
        return self._share((self.status != ANSWERED) & (self.status != NO_ANSWER))

    @property
    def unanswered(self) -> float:
        """The share of those without any answer."""
        return self._share(self.status == NO_ANSWER)

    @property
    def lessened(self) -> float:
        """The share of lesser answers."""
        return self._share(self.answered & self.lesser)

    def _share(self, of: np.ndarray) -> float:
        return float(of.mean()) if len(of) else 0.0


def knee(steps: Sequence[Step], deadline_ms: float) -> int:
    """The place of the rate with the highest goodput."""
    return int(np.argmax([step.goodput(deadline_ms) for step in steps]))


def capacity(outcomes: dict[str, Any]) -> float:
    """Answers with status 200 a second of a closed loop, of those that came before its end.

    Raises:
        RuntimeError: there is none.
    """
    ended = [at + latency for at, latency in zip(outcomes["due"], outcomes["latency"], strict=True)]
    count = sum(s == ANSWERED and end <= outcomes["seconds"] for s, end in zip(outcomes["status"], ended, strict=True))
    if count == 0:
        raise RuntimeError(f"a closed loop had no answer with status 200, but {sorted(set(outcomes['status']))}")
    return float(count / outcomes["seconds"])
