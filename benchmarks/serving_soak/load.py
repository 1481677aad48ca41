# SPDX-License-Identifier: Apache-2.0
"""Requests as bytes over kept connections: in an open loop, at times that were drawn beforehand, or in a closed one.

A latency counts from the time at which a request was due, so that a server that stalls is charged for those that it kept from being sent.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from benchmarks.serving.load import NO_ANSWER, Connection

LESS = (b'"cached_features"', b'"retriever_only"', b'"popular"')
_MOST_UNDER_WAY = 2000


@dataclass
class Seen:
    """What came of requests.

    Attributes:
        seconds: of each that was answered with 200, from when it was due.
        errors: by status; 0 for a connection that ended without an answer, or a request for which there was no room here.
        less: answers with 200 that a rung of the ladder gave.
    """

    seconds: list[float] = field(default_factory=list)
    errors: dict[int, int] = field(default_factory=dict)
    less: int = 0

    def add(self, status: int, seconds: float, body: bytes) -> None:
        """One answer."""
        if status == 200:
            self.seconds.append(seconds)
            self.less += any(flag in body for flag in LESS)
        else:
            self.errors[status] = self.errors.get(status, 0) + 1

    def percentile(self, percent: float) -> float:
        """Of the seconds; NaN where nothing was answered."""
        return float(np.percentile(self.seconds, percent)) if self.seconds else float("nan")


class Client:
    """Kept connections to a server.

    Args:
        port: on this machine.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Connection] = []
        self._asked: dict[Connection, asyncio.Future[tuple[int, bytes]]] = {}
        self._under_way: set[asyncio.Task[None]] = set()

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and answer. A kept connection that the server had just closed is no answer: the request is sent over a new one."""
        while self._idle:
            status, answer = await self._over(self._idle.pop(), request)
            if status != NO_ANSWER:
                return status, answer
        try:
            made = await asyncio.get_running_loop().create_connection(
                lambda: Connection(self._answered, self._lost), "127.0.0.1", self._port
            )
        except OSError:
            return NO_ANSWER, b""
        return await self._over(made[1], request)

    async def _over(self, connection: Connection, request: bytes) -> tuple[int, bytes]:
        answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._asked[connection] = answer
        connection.send(0, request)
        return await answer

    def _answered(self, connection: Connection, status: int, content: bytes, keep: bool) -> None:
        self._asked.pop(connection).set_result((status, content))
        if keep:
            self._idle.append(connection)
        else:
            connection.close()

    def _lost(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)
        if (answer := self._asked.pop(connection, None)) is not None and not answer.done():
            answer.set_result((NO_ANSWER, b""))

    async def offer(self, requests: Iterator[bytes], rate: float, seed: int, seen: "Windows", until: float) -> None:
        """Send requests at the times of a Poisson process, whatever becomes of those before, until a monotonic second."""
        times, due = np.random.default_rng(seed), time.monotonic()
        while True:
            for gap in times.exponential(1 / rate, 1000).tolist():
                due += gap
                if due >= until:
                    return
                if (wait := due - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                self._send(next(requests), due, seen)

    def _send(self, request: bytes, due: float, seen: "Windows") -> None:
        if len(self._under_way) >= _MOST_UNDER_WAY:
            seen.now.add(NO_ANSWER, 0.0, b"")
            return

        async def answered() -> None:
            status, body = await self.ask(request)
            seen.now.add(status, time.monotonic() - due, body)

        task = asyncio.create_task(answered())
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def drain(self) -> None:
        """Wait for what is under way, and close all connections."""
        while self._under_way:
            await asyncio.wait(set(self._under_way), timeout=30)
        for connection in self._idle:
            connection.close()


class Windows:
    """What was seen, window by window.

    Attributes:
        now: the window that runs.
    """

    def __init__(self) -> None:
        self.now = Seen()

    def turn(self) -> Seen:
        """Begin the next window; the one that ended."""
        ended, self.now = self.now, Seen()
        return ended


async def capacity(client: Client, requests: Iterator[bytes], clients: int, seconds: float) -> float:
    """Answers a second that some clients get who each ask again when they are answered."""
    until, answered = time.monotonic() + seconds, 0

    async def ask() -> None:
        nonlocal answered
        while time.monotonic() < until:
            status, _ = await client.ask(next(requests))
            answered += status == 200

    began = time.monotonic()
    await asyncio.gather(*(ask() for _ in range(clients)))
    return answered / (time.monotonic() - began)
