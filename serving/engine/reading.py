# SPDX-License-Identifier: Apache-2.0
"""Reading features on threads of their own, for as long as each request can wait for it."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Generic, Literal, TypeAlias, TypeVar

from serving.engine.breaker import Breaker
from serving.engine.threads import Daemons
from serving.logs import named

T = TypeVar("T")
Problem: TypeAlias = Literal["left alone", "too slow", "failed"]

# Requests whose time is over while another's is not nearly so go on without it, and not one by one.
_TOGETHER = 2.0


class Reads:
    """The threads that read, behind a circuit breaker.

    Args:
        threads: how many reads may run at one time; a hung one keeps its thread.
        share: of the time that a request has left, what one read may take.
        breaker: judges the store.
        failed: told of each read that failed, and why.
    """

    def __init__(self, threads: int, share: float, breaker: Breaker, failed: Callable[[str], None]) -> None:
        self.breaker = breaker
        self._share, self._failed = share, failed
        self._threads = Daemons(threads, "features")

    def begin(self, call: Callable[[], T], cutoffs: Sequence[float]) -> "Read[T]":
        """Begin to read for some requests.

        Args:
            call: reads.
            cutoffs: for each request, the monotonic second at which its list must be begun without.
        """
        now = time.monotonic()
        future = self._threads.submit(call) if self.breaker.allow() else None
        return Read(self, future, now, [now + self._share * (cutoff - now) for cutoff in cutoffs])

    def close(self) -> None:
        """Begin no more."""
        self._threads.close()

    def report(self, problem: str | None) -> None:
        """Take in how a read ended: None for well."""
        if problem is None:
            self.breaker.succeeded()
        else:
            self.breaker.failed()
            self._failed(problem)


class Read(Generic[T]):
    """A read under way.

    Attributes:
        result: what was read, for the requests that `groups` gave without a problem.
    """

    result: T

    def __init__(self, reads: Reads, future: "Future[T] | None", begun: float, limits: Sequence[float]) -> None:
        self._reads, self._future, self._begun, self._limits = reads, future, begun, limits

    def groups(self) -> Iterator[tuple[list[int], Problem | None]]:
        """Places of requests, and why they go on without the read, None where it was in time.

        Those that cannot wait come first, as soon as they cannot.
        """
        waiting = sorted(range(len(self._limits)), key=self._limits.__getitem__)
        if self._future is None:
            yield sorted(waiting), "left alone"
            return
        while waiting:
            first = self._limits[waiting[0]]
            done, _ = wait([self._future], timeout=max(0.0, first - time.monotonic()))
            if done:
                yield sorted(waiting), None if self._ended(self._future) else "failed"
                return
            most = self._begun + _TOGETHER * (first - self._begun)
            late = [place for place in waiting if self._limits[place] <= most]
            waiting = waiting[len(late) :]
            if not waiting:
                self._future.cancel()
                self._reads.report(f"no answer within {1000 * (first - self._begun):.0f} ms")
            yield sorted(late), "too slow"

    def _ended(self, future: "Future[T]") -> bool:
        """Whether it ended well; the breaker is told."""
        error = future.exception()
        if error is None:
            self.result = future.result()
        self._reads.report(None if error is None else named(error))
        return error is None
