# SPDX-License-Identifier: Apache-2.0
"""Which bundle is live: loaded, warmed and verified aside, put live by one assignment, and kept for a while when the next one comes."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from recsys.core.memory import give_back_memory
from serving.engine.loaded import Loaded
from serving.engine.pace import Pace
from serving.engine.source import Source, Target
from serving.engine.threads import give_way
from serving.engine.verify import check_answers, warm_up
from serving.logs import named
from serving.metrics import Metrics

log = logging.getLogger("serving")

_RECENT_USERS = 3

KeepUp: TypeAlias = Callable[[Loaded], Loaded]


@dataclass
class _Former:
    """A former champion, and when it is let go."""

    loaded: Loaded
    until: float


class Slots:
    """The bundle that answers, and the one that did before.

    Whoever answers reads ``loaded`` once and stays with it. A former bundle that is let go is freed when the last of those has ended.

    Args:
        most_rows: of a batch, to warm up to.
        keep_seconds: how long the former bundle stays warm.
        pace: learns from the first warm-up how long batches take.
        metrics: told of swaps.
        keep_up: what a bundle becomes before it goes live, and from then on by `renew`: itself with the changes of its catalogue.

    Attributes:
        loaded: the bundle that answers; None before the first.
        problem: why there is none, or why the last swap failed; None where all is well.
    """

    def __init__(self, most_rows: int, keep_seconds: float, pace: Pace, metrics: Metrics, keep_up: KeepUp = lambda loaded: loaded) -> None:
        self._most_rows, self._keep_seconds, self._pace, self._metrics = most_rows, keep_seconds, pace, metrics
        self._keep_up = keep_up
        self._swapping, self._flipping = threading.Lock(), threading.Lock()
        self._former: _Former | None = None
        self.loaded: Loaded | None = None
        self.problem: str | None = "the model is being loaded"

    @property
    def former(self) -> Loaded | None:
        """The bundle that answered before, while it is kept."""
        former = self._former
        return None if former is None else former.loaded

    def swap(self, load: Callable[[], Loaded]) -> Loaded:
        """Load a bundle, warm it, verify it, and put it live. Takes long; call it off the event loop. One swap at a time.

        Raises:
            Exception: whatever loading or verifying raised; the bundle that was live still is.
        """
        with self._swapping:
            began = time.monotonic()
            try:
                loaded = load()
                seen = warm_up(loaded, self._most_rows)
                recent = () if self.loaded is None else self.loaded.memory.newest(_RECENT_USERS)
                check_answers(loaded, recent)
            except Exception as error:
                self.problem = f"{type(error).__name__}: {error}"
                self._metrics.swaps.labels("failed").inc()
                raise
            if self.loaded is None:
                for rows, seconds in seen:
                    self._pace.observe(rows, seconds)
            loaded = self._flip(loaded, "loaded")
            give_back_memory()  # of loading and warming, and of the bundle before where none is kept
            log.info("live: %s version %d, after %.1f s", loaded.name, loaded.version, time.monotonic() - began)
            return loaded

    def flip_back(self, target: Target) -> bool:
        """Put the former bundle live again, if it is kept and is the one that is wanted; whether it was. Loads nothing."""
        with self._swapping:
            former = self.former
            if former is None or former.key != target.key:
                return False
            self._flip(former, "flipped_back")
            log.info("live again: %s version %d", former.name, former.version)
            return True

    def renew(self) -> None:
        """Bring the bundle that answers up to date; does not wait for a swap that is under way.

        Raises:
            Exception: whatever keeping it up raised; the bundle stays as it was.
        """
        with self._flipping:
            if self.loaded is not None:
                self.loaded = self._keep_up(self.loaded)

    def release(self) -> None:
        """Let the former bundle go, once its time is over; does not wait for a swap that is under way."""
        with self._flipping:
            over = self._former is not None and time.monotonic() >= self._former.until
            if over:
                self._former = None
        if over:
            give_back_memory()

    def _flip(self, loaded: Loaded, outcome: str) -> Loaded:
        with self._flipping:
            loaded, before = self._keep_up(loaded), self.loaded
            self.loaded = loaded
            self._former = None
            if before is not None and self._keep_seconds > 0:
                self._former = _Former(before, time.monotonic() + self._keep_seconds)
        self.problem = None
        self._metrics.live(_labels(loaded), None if before is None else _labels(before))
        self._metrics.swaps.labels(outcome).inc()
        return loaded


class Follower:
    """A thread that puts live what its source names, again and again, and tries what failed after a while.

    Args:
        source: names and loads bundles.
        slots: where they go.
        poll_seconds: between two looks.
        retry_seconds: between two attempts with one bundle that failed.
    """

    def __init__(self, source: Source, slots: Slots, poll_seconds: float, retry_seconds: float) -> None:
        self._source, self._slots = source, slots
        self._poll_seconds, self._retry_seconds = poll_seconds, retry_seconds
        self._failed: tuple[tuple[int, str] | None, float] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after what is under way; does not wait for it."""
        self._stopped.set()

    def _follow(self) -> None:
        went_first = True
        while not self._stopped.is_set():
            self._look()
            if went_first and self._slots.loaded is not None:
                give_way()  # from now on there are requests, which a bundle that is being loaded must not keep waiting
                went_first = False
            self._stopped.wait(self._poll_seconds)

    def _look(self) -> None:
        key: tuple[int, str] | None = None
        try:
            target = self._source.target()
            key = target.key
            live = self._slots.loaded
            if live is not None and live.key == key:
                # What could not be loaded is no longer wanted.
                if self._failed is not None:
                    self._failed = self._slots.problem = None
                return
            if self._waits(key) or self._slots.flip_back(target):
                return
            self._slots.swap(lambda: self._source.load(target))
        except Exception as error:
            self._failed = (key, time.monotonic() + self._retry_seconds)
            self._slots.problem = str(error) or type(error).__name__
            # As text: whoever keeps what is logged would keep the error, its frames, and the bundle in them.
            log.warning("not swapped: %s; next attempt in %.0f s", named(error), self._retry_seconds)

    def _waits(self, key: tuple[int, str]) -> bool:
        """Whether this bundle failed a short time ago."""
        return self._failed is not None and self._failed[0] == key and time.monotonic() < self._failed[1]


def _labels(loaded: Loaded) -> tuple[str, str, str]:
    return loaded.name, str(loaded.version), loaded.sha256
