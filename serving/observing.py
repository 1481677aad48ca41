# SPDX-License-Identifier: Apache-2.0
"""The outermost layer of the application: when a request arrived, by which names it is known, and what became of it."""

import logging
import re
import time
import uuid
from typing import Literal, TypeAlias

from opentelemetry.trace import Span
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recsys.core.deadline import RejectReason
from serving.logs import FIELDS
from serving.metrics import Metrics
from serving.scope import ARRIVED, FLAGS, ID_HEADER, REASON, REQUEST_ID, VERSION
from serving.security.guard import OPEN
from serving.tracing import Headers, Tracing, exemplar_of, headers_of, responded, trace_id_of

log = logging.getLogger("serving.requests")

LogRequests: TypeAlias = Literal["all", "errors"]

_QUIET = OPEN | {"/metrics"}
"""What is asked every few seconds, and logged only where it fails."""
_FAILED, _GONE, _ERROR = 500, 499, 400
_ID = re.compile(r"[!-~]{1,128}")


class Observe:
    """Names every request in its scope, traces it, and counts and logs its response; the response says the name and the trace.

    Args:
        app: what answers.
        metrics: count.
        tracing: makes the span.
        logged: which requests have a line in the log.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing, logged: LogRequests = "all") -> None:
        self._app, self._metrics, self._tracing, self._logged = app, metrics, tracing, logged

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[ARRIVED] = arrived = time.monotonic()
        scope[REQUEST_ID] = request_id = _request_id(scope["headers"])
        with self._tracing.request(scope) as span:
            added = [(ID_HEADER.encode(), request_id.encode()), *headers_of(span)]
            status = 0

            async def observed(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    message = {**message, "headers": [*message.get("headers", ()), *added]}
                await send(message)

            try:
                await self._app(scope, receive, observed)
            except Exception:
                # Where the application fails before it responds, the server responds.
                status, scope[REASON] = status or _FAILED, RejectReason.INTERNAL.value
                raise
            finally:
                self._ended(scope, span, status or _GONE, time.monotonic() - arrived)

    def _ended(self, scope: Scope, span: Span, status: int, seconds: float) -> None:
        found: str | None = getattr(scope.get("route"), "path", None)
        route, reason = found or "unknown", scope.get(REASON)
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.latency.labels(route).observe(seconds, exemplar_of(span))
        responded(span, scope, found, status, reason)
        if status < _ERROR and (self._logged == "errors" or route in _QUIET):
            return
        fields = {
            "request_id": scope[REQUEST_ID],
            "trace_id": trace_id_of(span),
            "route": route,
            "status": status,
            "reason": reason,
            "milliseconds": round(1000 * seconds, 3),
            "version": scope.get(VERSION),
            "flags": scope.get(FLAGS),
        }
        level = logging.WARNING if status >= _FAILED else logging.INFO
        log.log(level, "request", extra={FIELDS: fields})


def _request_id(headers: Headers) -> str:
    """The caller's id where it gave a printable one of at most 128 characters, else a new one."""
    wanted = ID_HEADER.encode()
    given = next((value.decode("latin-1") for name, value in headers if name == wanted), "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex
