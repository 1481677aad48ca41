# SPDX-License-Identifier: Apache-2.0
"""Ending in good order when the machine is taken away: SIGTERM is noted, the state saved, and the exit status says "run me again"."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: try again
STOP = "RECSYS_STOP"  # names a file that asks to end as SIGTERM does, where signals do not reach a process


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

    Where the environment names a file in ``RECSYS_STOP``, that file is as good as the signal once it is there.

    Args:
        tell: called when the signal comes.
    """

    def __init__(self, tell: Callable[[], object] | None = None) -> None:
        self._came, self._tell = False, tell
        self._file = Path(os.environ[STOP]) if STOP in os.environ else None
        self._previous: Any = None

    @property
    def came(self) -> bool:
        """Whether this process was asked to end."""
        return self._came or (self._file is not None and self._file.exists())

    def __enter__(self) -> "Sigterm":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, *_: object) -> None:
        self._came = True
        if self._tell is not None:
            self._tell()
