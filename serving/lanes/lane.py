# SPDX-License-Identifier: Apache-2.0
"""A bundle beside the champion, as the promotion log names it."""

import logging
import threading
import time
from collections.abc import Callable

from recsys.registry import Event
from serving.engine.loaded import Loaded
from serving.engine.source import Target
from serving.engine.swap import KeepUp
from serving.engine.verify import check_answers, warm_up
from serving.logs import named

log = logging.getLogger("serving")


class Lane:
    """Follows one state of the log. What cannot be loaded is tried again after a while; nobody is sent to it until then.

    Args:
        find: the event that made the bundle of this lane, None while there is none; cheap.
        load: loads it, verified. May take long.
        most_rows: of a batch, to warm up to.
        retry_seconds: between two attempts with a bundle that failed.
        keep_up: gives a bundle with the changes of its catalogue.

    Attributes:
        now: the event and its bundle, None while there is none to send to; read it once and stay with it.
        problem: why a bundle could not be loaded.
    """

    def __init__(
        self,
        find: Callable[[], Event | None],
        load: Callable[[Target], Loaded],
        *,
        most_rows: int,
        retry_seconds: float = 5.0,
        keep_up: KeepUp = lambda loaded: loaded,
    ) -> None:
        self._find, self._load, self._keep_up = find, load, keep_up
        self._most_rows, self._retry_seconds = most_rows, retry_seconds
        self._retry_at = 0.0
        self._changing = threading.Lock()
        self.now: tuple[Event, Loaded] | None = None
        self.problem: str | None = None

    def follow(self) -> None:
        """Look into the log; loads what it names, if that is another bundle. Takes long then.

        Raises:
            RecsysError: the log cannot be read.
        """
        event, now = self._find(), self.now
        if event is None:
            self.now = self.problem = None
        elif now is not None and now[1].key == (event.to_version, event.sha256):
            if now[0] != event:
                with self._changing:
                    self.now = (event, now[1])
        elif time.monotonic() >= self._retry_at:
            self.now = None
            self._bring(event)

    def renew(self) -> None:
        """Bring the bundle up to date with the changes of its catalogue."""
        with self._changing:
            if self.now is not None:
                event, loaded = self.now
                self.now = (event, self._keep_up(loaded))

    def _bring(self, event: Event) -> None:
        try:
            loaded = self._load(Target(event.model, event.to_version, event.sha256))
            warm_up(loaded, self._most_rows)
            check_answers(loaded)
            loaded = self._keep_up(loaded)
        except Exception as error:
            self._retry_at = time.monotonic() + self._retry_seconds
            self.problem = f"{event.action} {event.to_version}: {type(error).__name__}: {error}"
            log.warning("not loaded: %s %d: %s; next attempt in %.0f s", event.action, event.to_version, named(error), self._retry_seconds)
            return
        with self._changing:
            self.now, self.problem = (event, loaded), None
        log.info("%s: %s version %d", event.action, loaded.name, loaded.version)
