# SPDX-License-Identifier: Apache-2.0
"""A handler that does nothing, for the ceiling of the generator: every request has the same answer, ``empty_server.py PORT BYTES``."""

import asyncio
import sys

HEAD_END = b"\r\n\r\n"


class Empty(asyncio.Protocol):
    def __init__(self, answer: bytes) -> None:
        self._answer, self._missing = answer, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._missing == 0:
            head = data.find(HEAD_END)  # the generator writes a request at once, so that its first part holds the head
            at = data.find(b"content-length: ")
            length = int(data[at + 16 : data.index(b"\r\n", at)]) if at >= 0 else 0
            self._missing = head + len(HEAD_END) + length
        self._missing -= len(data)
        if self._missing == 0:
            self._transport.write(self._answer)


async def main(port: int, size: int) -> None:
    """Serve until the process is ended."""
    answer = f"HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n".encode() + b"x" * size
    server = await asyncio.get_running_loop().create_server(lambda: Empty(answer), "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
