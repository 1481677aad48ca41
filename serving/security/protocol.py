# SPDX-License-Identifier: Apache-2.0
"""uvicorn's protocol, with an end to what a client may take its time for, and refusals in the form of all others.

Heads of requests may come byte by byte, or never end; what is sent behind an answer may go on for ever; an answer may never be read.
"""

import asyncio
from functools import cache
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from recsys.core.deadline import RejectReason
from serving.security.refusal import body_of
from serving.settings import Settings


class BoundedProtocol(HttpToolsProtocol):
    """See the module. The bounds are those of the settings in the environment, through which a worker process gets its own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._most_bytes, self._seconds = _bounds()
        self._head_bytes = 0
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`. A connection that says nothing is slow as well."""
        super().connection_made(transport)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._end()
        self._is_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        if self._late is None and self._idle():
            # What is no beginning of a request ends uvicorn's wait for one as well, such as the rest of a body that was refused.
            self._begin()
        if self._late is None:
            return
        self._head_bytes += len(data)
        if self._head_bytes > self._most_bytes:
            self._give_up(431, f"headers: expected at most {self._most_bytes} bytes")

    def on_message_begin(self) -> None:
        """The first byte of a request's line."""
        super().on_message_begin()
        self._begin()

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._end()
        super().on_headers_complete()
        if self.parser.should_upgrade():
            # It is answered as any other request, but its parser reads no further ones.
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        """An answer was handed over to be sent."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._wait_for_reader()

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`: the client does not read."""
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        self._is_read()

    def timeout_keep_alive_handler(self) -> None:
        """The client asks for nothing more."""
        super().timeout_keep_alive_handler()
        self._wait_for_reader()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._end()
        self._refuse(400, f"request: {msg}")

    def _may_answer(self) -> bool:
        """Whether the next answer is that of the request that is refused: nothing else waits for one."""
        if self.cycle is None or self.cycle.response_complete:
            return True
        return self.cycle.more_body and not self.cycle.response_started and not self.pipeline

    def _idle(self) -> bool:
        return not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)

    def _begin(self) -> None:
        if self._late is None:
            self._head_bytes = 0
            self._late = self.loop.call_later(self._seconds, self._give_up, 408, f"headers: expected within {self._seconds:g} s")

    def _end(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _wait_for_reader(self) -> None:
        if self._unread is None:
            self._unread = self.loop.call_later(self._seconds, self.transport.abort)

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _give_up(self, status: int, message: str) -> None:
        self._end()
        self._refuse(status, message)

    def _refuse(self, status: int, message: str) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        if self._may_answer():
            body = body_of(RejectReason.INVALID_INPUT, message)
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()
        self._wait_for_reader()


@cache
def _bounds() -> tuple[int, float]:
    settings = Settings.from_environment()
    return settings.header_bytes, settings.head_seconds
