# SPDX-License-Identifier: Apache-2.0
"""uvicorn's protocol, with an end to heads of requests that come byte by byte, or that never end."""

import asyncio
from functools import cache
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.settings import Settings

_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BoundedProtocol(HttpToolsProtocol):
    """See the module. The bounds are those of the settings in the environment, through which a worker process gets its own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._most_bytes, self._seconds = _bounds()
        self._head_bytes = 0
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`. A connection that says nothing is slow as well."""
        super().connection_made(transport)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        if self._late is None:
            return
        self._head_bytes += len(data)
        if self._head_bytes > self._most_bytes:
            self._give_up(_TOO_LARGE)

    def on_message_begin(self) -> None:
        """The first byte of a request's line."""
        super().on_message_begin()
        self._begin()

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._end()
        super().on_headers_complete()

    def _begin(self) -> None:
        if self._late is None:
            self._head_bytes = 0
            self._late = self.loop.call_later(self._seconds, self._give_up, _TOO_SLOW)

    def _end(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self, why: bytes) -> None:
        self._end()
        if self.transport is not None and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(why)
            self.transport.close()


@cache
def _bounds() -> tuple[int, float]:
    settings = Settings.from_environment()
    return settings.header_bytes, settings.head_seconds
