# SPDX-License-Identifier: Apache-2.0
"""Load on an HTTP/1.1 server over keep-alive connections: at times drawn beforehand, or one request after another. Imports no library.

**Open loop.** Requests are due at times that do not depend on the server, and a latency counts from when its request was due, not from
when a connection could be had: a server that stalls makes all late that were due meanwhile (no coordinated omission).
"""

import asyncio
import gc
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

NO_ANSWER = 0
"""The status of a request that got none: its client gave up, or the connection was lost or never made."""
_IDLE_SECONDS = 2.0  # kept no longer: servers close idle connections after five seconds or more, perhaps just as one is used
_FIRST_SECONDS = 0.1  # before the first request is due


@dataclass
class Outcomes:
    """What became of requests, in the order in which they were due.

    Attributes:
        began: monotonic seconds; 0 of the times in ``due``.
        seconds: how long requests were due, or, of a closed loop, were sent.
        due: seconds.
        latency: seconds from when a request was due to its last byte.
        status: of HTTP, or `NO_ANSWER`.
        lesser: whether the server says that the answer is a lesser one.
        lag: seconds by which a request was sent late although a connection was free.
    """

    began: float = 0.0
    seconds: float = 0.0
    due: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    lesser: list[bool] = field(default_factory=list)
    lag: list[float] = field(default_factory=list)


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """The times of a Poisson process of ``rate`` a second, up to ``seconds``."""
    draw, at, times = random.Random(seed), 0.0, []
    while (at := at + draw.expovariate(rate)) < seconds:
        times.append(at)
    return times


def encoded(path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """A whole request."""
    lines = {"host": "localhost", "content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    return "".join([f"POST {path} HTTP/1.1\r\n", *(f"{name}: {value}\r\n" for name, value in lines.items()), "\r\n"]).encode() + body


class Connection(asyncio.Protocol):
    """One connection, with at most one request under way.

    Args:
        answered: told of status and bytes of an answer, and whether the connection can go on.
        lost: told when it has ended.
    """

    def __init__(self, answered: "Callable[[Connection, int, bytes, bool], None]", lost: "Callable[[Connection], None]") -> None:
        self._answered, self._lost = answered, lost
        self._buffer, self._length, self._chunked = bytearray(), -1, False
        self.transport: asyncio.Transport | None = None
        self.request = -1
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._lost(self)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        buffer = self._buffer
        buffer += data
        if self._length < 0 and not self._chunked and not self._read_head():
            return
        if self._chunked:
            if not buffer.endswith(b"0\r\n\r\n"):
                return
        elif len(buffer) < self._length:
            return
        content = bytes(buffer)
        buffer.clear()
        self._length, self._chunked = -1, False
        keep = b"connection: close" not in content[: content.find(b"\r\n\r\n")].lower()
        self._answered(self, int(content[9:12]), content, keep)

    def send(self, request: int, content: bytes) -> None:
        """Begin a request, by its number."""
        assert self.transport is not None
        self.request = request
        self.transport.write(content)

    def close(self) -> None:
        """End it, whatever is under way."""
        if self.transport is not None:
            self.transport.abort()

    def _read_head(self) -> bool:
        """How long the answer is; whether its head is there."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = bytes(self._buffer[: end + 2]).lower()
        at = head.find(b"\r\ncontent-length:")
        self._chunked = at < 0 and b"\r\ntransfer-encoding: chunked" in head
        self._length = end + 4 + (int(head[at + 17 : head.index(b"\r\n", at + 2)]) if at >= 0 else 0)
        return True


class OpenLoop:
    """See the module.

    Args:
        port: of this machine.
        requests: whole requests, which are sent in turns.
        due: seconds from the start, in order.
        give_up: seconds after which nobody waits for an answer; the connection is closed then, as clients do.
        lesser: bytes, each of which in an answer says that it is a lesser one. Looked for behind ``"flags"``.
        most: connections. A request that finds none waits for one, and its time runs.
    """

    def __init__(
        self, port: int, requests: Sequence[bytes], due: Sequence[float], *, give_up: float, lesser: Sequence[bytes] = (), most: int = 1024
    ) -> None:
        self._port, self._requests, self._give_up, self._marks, self._most = port, requests, give_up, lesser, most
        self._idle: list[Connection] = []
        self._waiting: deque[int] = deque()
        self._on: dict[int, Connection] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = 0
        self._left = len(due)
        count = len(due)
        self._found = Outcomes(due=list(due), latency=[give_up] * count, status=[NO_ANSWER] * count, lesser=[False] * count)

    async def run(self, seconds: float) -> Outcomes:
        """Send all, and wait until each has an answer or was given up.

        Args:
            seconds: how long requests are due.
        """
        self._loop, self._done = asyncio.get_running_loop(), asyncio.Event()
        with _undisturbed():
            self._began = self._loop.time() + _FIRST_SECONDS
            self._found.began, self._found.seconds = self._began, seconds
            for request, at in enumerate(self._found.due):
                self._loop.call_at(self._began + at, self._start, request)
            if self._left:
                await self._done.wait()
        for connection in self._idle:
            connection.close()
        return self._found

    def _start(self, request: int) -> None:
        due = self._began + self._found.due[request]
        self._timers[request] = self._loop.call_at(due + self._give_up, self._gave_up, request)
        connection = self._usable()
        if connection is not None:
            self._found.lag.append(self._loop.time() - due)
            self._send(connection, request)
        elif self._open < self._most:
            self._connect(request)
        else:
            self._waiting.append(request)

    def _usable(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if self._loop.time() - connection.idle_since < _IDLE_SECONDS:
                return connection
            connection.close()
        return None

    def _connect(self, request: int) -> None:
        self._open += 1
        task = self._loop.create_task(self._connected(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connected(self, request: int) -> None:
        try:
            _, connection = await self._loop.create_connection(lambda: Connection(self._answered, self._lost), "127.0.0.1", self._port)
        except OSError:
            self._open -= 1
            self._decide(request, NO_ANSWER)
            return
        if request in self._timers:
            self._send(connection, request)
        else:
            self._free(connection)

    def _send(self, connection: Connection, request: int) -> None:
        self._on[request] = connection
        connection.send(request, self._requests[request % len(self._requests)])

    def _answered(self, connection: Connection, status: int, content: bytes, keep: bool) -> None:
        request = connection.request
        connection.request = -1
        self._on.pop(request, None)
        self._decide(request, status, content)
        if keep:
            self._free(connection)
        else:
            connection.close()

    def _free(self, connection: Connection) -> None:
        while self._waiting:
            request = self._waiting.popleft()
            if request in self._timers:
                self._send(connection, request)
                return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)

    def _lost(self, connection: Connection) -> None:
        self._open -= 1
        if connection in self._idle:
            self._idle.remove(connection)
        if connection.request >= 0:
            self._on.pop(connection.request, None)
            self._decide(connection.request, NO_ANSWER)
        while self._waiting and self._open < self._most:
            request = self._waiting.popleft()
            if request in self._timers:
                self._connect(request)

    def _gave_up(self, request: int) -> None:
        self._decide(request, NO_ANSWER)
        connection = self._on.pop(request, None)
        if connection is not None:
            connection.request = -1
            connection.close()

    def _decide(self, request: int, status: int, content: bytes = b"") -> None:
        timer = self._timers.pop(request, None)
        if timer is None:
            return
        timer.cancel()
        found = self._found
        found.status[request] = status
        found.latency[request] = self._loop.time() - self._began - found.due[request]
        found.lesser[request] = _is_lesser(content, self._marks)
        self._left -= 1
        if self._left == 0:
            self._done.set()


async def closed_loop(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Outcomes:
    """So many clients, each of which asks again as soon as it is answered, for some seconds.

    Raises:
        ConnectionError: a connection was lost.
    """
    loop, found = asyncio.get_running_loop(), Outcomes(seconds=seconds)
    turns = iter(range(2**62))

    async def client() -> None:
        answer: asyncio.Future[tuple[int, bytes]]

        def answered(connection: Connection, status: int, content: bytes, keep: bool) -> None:
            answer.set_result((status, content))

        def lost(connection: Connection) -> None:
            if not answer.done():
                answer.set_exception(ConnectionError(f"port {port}: a connection was lost"))

        answer = loop.create_future()
        _, connection = await loop.create_connection(lambda: Connection(answered, lost), "127.0.0.1", port)
        try:
            while (sent := loop.time()) - began < seconds:
                answer = loop.create_future()
                connection.send(0, requests[next(turns) % len(requests)])
                status, _ = await answer
                found.due.append(sent - began)
                found.latency.append(loop.time() - sent)
                found.status.append(status)
                found.lesser.append(False)
        finally:
            if not answer.done():
                answer.cancel()
            connection.close()

    with _undisturbed():
        began = found.began = loop.time()
        await asyncio.gather(*(client() for _ in range(clients)))
    return found


def _is_lesser(content: bytes, marks: Sequence[bytes]) -> bool:
    if not marks or not content:
        return False
    at = content.rfind(b'"flags"')
    return at >= 0 and any(content.find(mark, at) >= 0 for mark in marks)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without pauses for collecting garbage, of which there is none to speak of in so short a time."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def as_json(found: Outcomes) -> dict[str, Any]:
    """The outcomes for another process."""
    return vars(found)
