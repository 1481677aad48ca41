# SPDX-License-Identifier: Apache-2.0
"""A rejection before the application has seen the request, in the form of all rejections."""

import json
from collections.abc import Mapping

from starlette.types import Scope, Send

from recsys.core.deadline import RejectReason
from serving.metrics import Metrics
from serving.scope import REASON


async def refuse(
    scope: Scope,
    send: Send,
    metrics: Metrics,
    status: int,
    reason: RejectReason,
    message: str,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Answer with a rejection, and count it; whoever observes is told the reason by the scope."""
    scope[REASON] = reason.value
    metrics.rejected.labels(reason.value).inc()
    body = body_of(reason, message)
    fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def body_of(reason: RejectReason, message: str) -> bytes:
    """The JSON of a rejection."""
    return json.dumps({"error": reason.value, "message": message}).encode()
