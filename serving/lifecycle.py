# SPDX-License-Identifier: Apache-2.0
"""The end of a server: unready at once, then a while for whoever sends requests to notice, then uvicorn's own orderly end."""

import asyncio
import signal
import threading
from types import FrameType

from serving.engine import Engine


def drain_on_sigterm(engine: Engine, grace_seconds: float) -> None:
    """Put the grace before what SIGTERM does now; a second SIGTERM ends it. For the event loop of a main thread, else without effect."""
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    end = signal.getsignal(signal.SIGTERM)

    def finish(number: int) -> None:
        if callable(end):
            end(number, None)

    def begin(number: int, _frame: FrameType | None) -> None:
        if engine.draining:
            finish(number)
            return
        engine.drain()
        loop.call_soon_threadsafe(loop.call_later, grace_seconds, finish, number)

    signal.signal(signal.SIGTERM, begin)
