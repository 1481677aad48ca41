# SPDX-License-Identifier: Apache-2.0
"""A second port of the server, for routes that whoever reaches the first one must not reach."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI

from recsys.core.errors import ConfigError
from serving.security.protocol import BoundedProtocol

_SECONDS = 5


@asynccontextmanager
async def second_port(app: FastAPI, host: str, port: int) -> AsyncIterator[None]:
    """Answer there by an application while inside, on the same event loop. Several processes may share the port.

    Raises:
        ConfigError: the port cannot be listened on.
    """
    listening = _bound(host, port)
    config = uvicorn.Config(
        app, http=BoundedProtocol, lifespan="off", log_config=None, log_level="warning", timeout_graceful_shutdown=_SECONDS
    )
    server = _Beside(config)
    task = asyncio.ensure_future(server.serve([listening]))
    try:
        yield
    finally:
        server.should_exit = True
        await task


class _Beside(uvicorn.Server):
    """A server whose process is another one's: that one's signals are not its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigError(f"admin_port: cannot listen on {host}, port {port}: {error.strerror}") from None
    return listening
