# SPDX-License-Identifier: Apache-2.0
"""Threads that a hung call cannot keep the process from ending with."""

import contextvars
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

log = logging.getLogger("serving")

T = TypeVar("T")
_BEHIND = 10  # a tenth of the weight of other threads: even on a full host what gives way comes to its end


class Daemons:
    """Some daemon threads that call what they are given, in its order; `concurrent.futures` would wait for its threads when Python ends."""

    def __init__(self, count: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], T]) -> "Future[T]":
        """The outcome of a call in the context of the caller, to come; cancelling it takes back a call that has not begun."""
        future: Future[T] = Future()
        context = contextvars.copy_context()

        def task() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(context.run(call))
            except BaseException as error:
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def close(self) -> None:
        """End the threads once they have done what they were given; does not wait for them."""
        for _ in self._threads:
            self._tasks.put(None)

    def _work(self) -> None:
        while self._do_one():
            continue

    def _do_one(self) -> bool:
        """False at the end. What a task refers to is held no longer than it runs."""
        task = self._tasks.get()
        if task is not None:
            task()
        return task is not None


def give_way() -> None:
    """Let the other threads of this process go first where they want the processor; on Linux, where threads have their own priorities."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BEHIND)


class Repeating:
    """A daemon thread that makes a call again and again; what it raises is logged, and tried again.

    Args:
        call: returns soon.
        seconds: between two calls.
        name: of the thread.
    """

    def __init__(self, call: Callable[[], None], seconds: float, name: str) -> None:
        self._call, self._seconds, self._name = call, seconds, name
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after what is under way; does not wait for it."""
        self._stopped.set()

    def _repeat(self) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                self._call()
            except Exception:
                log.exception("%s failed; next attempt in %.2f s", self._name, self._seconds)
