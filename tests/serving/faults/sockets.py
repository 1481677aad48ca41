# SPDX-License-Identifier: Apache-2.0
"""Clients that are no good ones: bytes as they are, at any pace, and connections that end when they like."""

import json
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from recsys.core.deadline import RejectReason

JSON = "application/json"


@dataclass(frozen=True)
class Told:
    """What a server said until it closed the connection, and after how many seconds that was."""

    answer: bytes
    seconds: float

    @property
    def status(self) -> int:
        return int(self.answer.split(b" ", 2)[1])

    @property
    def body(self) -> Any:
        _head, _, body = self.answer.partition(b"\r\n\r\n")
        return json.loads(body)

    def is_refusal(self, status: int) -> None:
        """It is one refusal, in the form of all refusals."""
        assert self.answer.startswith(b"HTTP/1.1 "), self.answer[:200]
        assert self.status == status, self.answer[:500]
        assert set(self.body) == {"error", "message"} and self.body["error"] in set(RejectReason) and self.body["message"], self.answer


def post(
    body: bytes, path: str = "/v1/recommend", *headers: str, kind: str | None = JSON, method: str = "POST", length: bool = True
) -> bytes:
    """A request as bytes."""
    lines = [f"{method} {path} HTTP/1.1", "host: test", "connection: close", *headers]
    lines += [] if kind is None else [f"content-type: {kind}"]
    lines += [f"content-length: {len(body)}"] if length else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def tell(port: int, *parts: bytes, pause: float = 0.0, seconds: float = 20.0) -> Told:
    """Send parts, then hear what the server says until it ends the connection."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        _send(connection, parts, pause)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
    return Told(answer, time.monotonic() - began)


def pour(port: int, head: bytes, chunks: Iterable[bytes], seconds: float = 60.0) -> tuple[Told, int]:
    """Send a head and as many chunks as the server takes; what it says, and how many bytes of chunks went out."""
    began, sent = time.monotonic(), 0
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(head)
        try:
            for chunk in chunks:
                connection.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except OSError:
            pass
    return Told(answer, time.monotonic() - began), sent


def leave(port: int, sent: bytes, after: float, *, reset: bool) -> None:
    """Send something, wait, and go: with a reset, or in an orderly way."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(sent)
        time.sleep(after)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _send(connection: socket.socket, parts: Iterable[bytes], pause: float) -> None:
    try:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
    except OSError:
        return
