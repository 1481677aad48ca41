# SPDX-License-Identifier: Apache-2.0
"""How large a request may be, how deep its JSON, and how long its body may take to come.

A body is read before the application sees the request: whatever is too large or too slow is refused with no more read than the limit.
"""

import asyncio
import re
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recsys.core.deadline import RejectReason
from serving.metrics import Metrics
from serving.security.refusal import refuse

_MOST_HEADERS = 100
_SKIPPED = bytes(set(range(256)) - set(b"[]{}"))
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"?')


@dataclass(frozen=True)
class _Refused(Exception):
    status: int
    message: str


class _Gone(Exception):
    """The client has gone before all of its request had come."""


class Limits:
    """See the module.

    Args:
        app: what sees the requests that fit.
        metrics: count those that do not.
        most_bytes: of a body.
        header_bytes: of all headers together.
        depth: of nested lists and objects in a JSON body.
        seconds: for a whole body to come.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, *, most_bytes: int, header_bytes: int, depth: int, seconds: float) -> None:
        self._app, self._metrics = app, metrics
        self._most, self._header_bytes, self._depth, self._seconds = most_bytes, header_bytes, depth, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_head(scope)
            body = await self._whole(scope, receive)
        except _Gone:
            await refuse(scope, send, self._metrics, 499, RejectReason.CANCELLED, "the client has gone")
            return
        except _Refused as error:
            # The rest of the body is not wanted, so the connection cannot go on.
            await refuse(scope, send, self._metrics, error.status, RejectReason.INVALID_INPUT, error.message, {"connection": "close"})
            return
        await self._app(scope, _replayed(body, receive), send)

    def _check_head(self, scope: Scope) -> None:
        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > _MOST_HEADERS or size > self._header_bytes:
            message = f"headers: expected at most {_MOST_HEADERS} of {self._header_bytes} bytes, got {len(headers)} of {size}"
            raise _Refused(431, message)
        for name, value in headers:
            if name == b"content-length" and (not value.isdigit() or len(value) > 18 or int(value) > self._most):
                raise self._too_large()

    async def _whole(self, scope: Scope, receive: Receive) -> bytes:
        """The body."""
        if scope["method"] in ("GET", "HEAD") and not _announced(scope):
            return b""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    part = message.get("body", b"")
                    if (size := size + len(part)) > self._most:
                        raise self._too_large()
                    parts.append(part)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise _Refused(408, f"body: expected within {self._seconds:g} s, got {size} bytes of it") from None
        body = b"".join(parts)
        if _is_json(scope) and depth_of(body, self._depth) > self._depth:
            raise _Refused(400, f"body: expected at most {self._depth} lists and objects within each other, got more")
        return body

    def _too_large(self) -> _Refused:
        return _Refused(413, f"body: expected at most {self._most} bytes")


def depth_of(body: bytes, enough: int | None = None) -> int:
    """How deep lists and objects are nested in a JSON text, without parsing it; brackets in strings do not count.

    Args:
        body: the text.
        enough: a depth that is not to be exceeded: the first above it is returned, whatever comes behind, or 0 where none can be above.
    """
    if enough is not None and body.count(b"[") + body.count(b"{") <= enough:
        return 0
    depth = deepest = 0
    for byte in _STRING.sub(b"", _ESCAPE.sub(b"", body)).translate(None, _SKIPPED):
        depth += 1 if byte in b"[{" else -1
        deepest = max(deepest, depth)
        if enough is not None and depth > enough:
            break
    return deepest


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _announced(scope: Scope) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


def _is_json(scope: Scope) -> bool:
    """Whether a body may be parsed as JSON: the binary tensors behind a JSON header are not."""
    return all(name != b"inference-header-content-length" for name, _ in scope["headers"])
