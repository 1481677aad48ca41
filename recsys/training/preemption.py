# SPDX-License-Identifier: Apache-2.0
"""Ending in good order when the machine is taken away: SIGTERM is noted, the state saved, and the exit status says "run me again"."""

import signal
import threading
from pathlib import Path
from typing import Any

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: try again


class Preempted(SystemExit):
    """SIGTERM came, and the run's state was saved. Uncaught, it ends the process with status 75: run it again to go on.

    Attributes:
        checkpoint: where the state was saved.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(RESUMABLE)
        self.checkpoint = checkpoint


class Sigterm:
    """Notes SIGTERM within a block, instead of dying of it. Only the main thread can; elsewhere nothing changes.

    Attributes:
        came: whether it came.
    """

    def __init__(self) -> None:
        self.came = False
        self._previous: Any = None

    def __enter__(self) -> "Sigterm":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, *_: object) -> None:
        self.came = True
