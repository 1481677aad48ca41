# SPDX-License-Identifier: Apache-2.0
"""Threads that a hung call cannot keep the process from ending with."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Daemons:
    """Some daemon threads that call what they are given, in its order; `concurrent.futures` would wait for its threads when Python ends."""

    def __init__(self, count: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], T]) -> "Future[T]":
        """The outcome of a call, to come; cancelling it takes back a call that has not begun."""
        future: Future[T] = Future()

        def task() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call())
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
