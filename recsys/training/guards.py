# SPDX-License-Identifier: Apache-2.0
"""What watches over a training: gradients that jump, and processes that stand still."""

import logging
import os
import statistics
import threading
import time
from collections import deque
from pathlib import Path
from typing import Literal

from pydantic import Field

from recsys.core.config import Config
from recsys.core.files import read_json, write_json
from recsys.data.world import World

Doing = Literal["loading", "training", "saving", "validating"]
STUCK = 76  # the exit status of a process that waited too long

logger = logging.getLogger(__name__)


class Guards(Config):
    """What is watched.

    Attributes:
        spike: a gradient norm of more than so many times the median of the last ``window`` is told and counted; None for never.
        window: how many norms make the median.
        stuck_seconds: where several processes train, all end once none of them has come further for so long, and say which it was that the
            others waited for; None for never.
    """

    spike: float | None = Field(20.0, gt=1)
    window: int = Field(100, ge=10)
    stuck_seconds: float | None = Field(1800.0, gt=0)


class Spikes:
    """Gradient norms that are far above those before.

    Args:
        guards: see `Guards`.
    """

    def __init__(self, guards: Guards) -> None:
        self._factor = guards.spike
        self._norms: deque[float] = deque(maxlen=guards.window)

    def look(self, step: int, norm: float) -> bool:
        """Take the norm of a step; whether it is a spike, which is told. The first few make no median yet."""
        enough = len(self._norms) >= min(10, self._norms.maxlen or 10)
        median = statistics.median(self._norms) if enough else None
        self._norms.append(norm)
        if self._factor is None or median is None or norm <= self._factor * median:
            return False
        times, last = norm / median if median else float("inf"), len(self._norms)
        logger.warning("step %d: the gradient norm is %g, %.0f times the median of the last %d", step, norm, times, last)
        return True


class Watchdog:
    """A thread in every process of a training, which ends the process once nothing has moved for too long.

    A process that waits for others cannot know for which, so each writes where it is, and whoever has waited too long reads what all wrote:
    the one that is furthest behind is the one they wait for.

    Args:
        folder: seen by all processes.
        world: the processes.
        seconds: see `Guards.stuck_seconds`.
    """

    def __init__(self, folder: Path, world: World, seconds: float) -> None:
        self._folder, self._world, self._seconds = folder, world, seconds
        self._place: tuple[int, Doing] = (0, "loading")
        self._moved = self._written = time.monotonic()
        self._over = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def note(self, step: int, doing: Doing) -> None:
        """Where this process is. On disk at most every half second."""
        self._place, self._moved = (step, doing), time.monotonic()

    def close(self) -> None:
        """Watch no more."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(0.5, self._seconds / 4)):
            if self._moved > self._written:
                self._write()
            if time.monotonic() - self._moved > self._seconds:
                logger.error("nothing has moved for %.0f s: %s", self._seconds, describe(self._folder, self._world))
                logging.shutdown()
                os._exit(STUCK)

    def _write(self) -> None:
        self._written = time.monotonic()
        step, doing = self._place
        write_json(self._folder / f"rank-{self._world.rank}.json", {"step": step, "doing": doing})


def describe(folder: Path, world: World) -> str:
    """Which processes the others wait for, from what all of them wrote in ``folder``."""
    places: dict[int, tuple[int, str]] = {}
    for rank in range(world.size):
        try:
            told = read_json(folder / f"rank-{rank}.json")
            places[rank] = (int(told["step"]), str(told["doing"]))
        except (OSError, ValueError, KeyError):
            return f"process {rank} has never begun"
    order = {"loading": 0, "training": 1, "saving": 2, "validating": 3}
    behind = min(places.values(), key=lambda place: (place[0], order.get(place[1], 0)))
    names = [str(rank) for rank, place in places.items() if place == behind]
    if len(names) == world.size:
        return f"all processes are {behind[1]}, after step {behind[0]}"
    return f"process {', '.join(names)} is still {behind[1]}, after step {behind[0]}; the others wait for it"
