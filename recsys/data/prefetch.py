# SPDX-License-Identifier: Apache-2.0
"""Preparing the next batches in a background thread."""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


def prefetch(source: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Yield what ``source`` yields, in order, while a thread prepares up to ``depth`` elements ahead.

    The thread starts with the first element asked for. An error of the source is raised where its element would have come. Closing
    the generator (or dropping it) stops the thread, closes the source, and returns once the thread has ended.
    """
    buffer: _Buffer[T] = _Buffer(depth)
    thread = threading.Thread(target=_fill, args=(iter(source), buffer), name="prefetch", daemon=True)
    thread.start()
    try:
        yield from buffer
    finally:
        buffer.stop()
        thread.join()


def _fill(source: Iterator[T], buffer: "_Buffer[T]") -> None:
    error: BaseException | None = None
    try:
        for element in source:
            if not buffer.put(element):
                break
        if isinstance(source, Generator):
            source.close()
    except BaseException as raised:
        error = raised
    buffer.finish(error)


class _Buffer(Generic[T]):
    """A bounded queue between one producer and one consumer, which either side can end."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._elements: deque[T] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._finished = False
        self._error: BaseException | None = None

    def put(self, element: T) -> bool:
        """Wait for room and add the element; False once the consumer has stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._elements) < self._depth)
            if not self._stopped:
                self._elements.append(element)
                self._changed.notify_all()
            return not self._stopped

    def finish(self, error: BaseException | None) -> None:
        """Called by the producer after its last element."""
        with self._changed:
            self._finished, self._error = True, error
            self._changed.notify_all()

    def stop(self) -> None:
        """Called by the consumer when it wants no more."""
        with self._changed:
            self._stopped = True
            self._elements.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._finished or bool(self._elements))
                if not self._elements:
                    break
                element = self._elements.popleft()
                self._changed.notify_all()
            yield element
        if self._error is not None:
            raise self._error
