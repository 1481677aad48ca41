# SPDX-License-Identifier: Apache-2.0
"""Asks every request for a key or a token, a scope that its route needs, and a place within its caller's rate."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from recsys.core.deadline import RejectReason
from serving.metrics import Metrics
from serving.security.credentials import Caller, Credentials
from serving.security.refusal import refuse

OPEN = frozenset({"/livez", "/readyz", "/startupz", "/ping", "/health", "/version", "/v2/health/live", "/v2/health/ready"})
"""What needs no key: whoever asks learns whether the server is well, and nothing else."""
_NEEDS = (
    ("/v1/events", "events"),
    ("/v1/", "recommend"),
    ("/v2", "recommend"),
    ("/invocations", "recommend"),
    ("/metrics", "metrics"),
)
_CALLERS = 10_000


def scope_of(path: str) -> str | None:
    """The scope that a path needs; None for those that are open. What is not known needs the largest."""
    if path in OPEN:
        return None
    return next((scope for start, scope in _NEEDS if path.startswith(start)), "admin")


class Bucket:
    """A token bucket: ``burst`` requests at once, ``rate`` a second over time.

    Args:
        rate: requests a second.
        burst: requests at once.
        clock: monotonic seconds.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._left, self._at = float(burst), clock()

    def take(self) -> float:
        """0 where a request may go; else the seconds until the next one may."""
        now = self._clock()
        self._left, self._at = min(self._burst, self._left + self._rate * (now - self._at)), now
        if self._left >= 1:
            self._left -= 1
            return 0.0
        return (1 - self._left) / self._rate


class Guard:
    """See the module. Keys come in the header ``x-api-key`` or, like tokens, in ``authorization: Bearer …``; never in an address.

    Args:
        app: what is guarded.
        credentials: tell callers.
        metrics: count what is refused.
    """

    def __init__(self, app: ASGIApp, credentials: Credentials, metrics: Metrics) -> None:
        self._app, self._credentials, self._metrics = app, credentials, metrics
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http" or (needed := scope_of(scope["path"])) is None:
            await self._app(scope, receive, send)
            return
        caller = self._credentials.caller(_given(scope))
        if caller is None:
            what = "expected an API key or a token, in the header x-api-key or authorization: Bearer"
            await refuse(scope, send, self._metrics, 401, RejectReason.UNAUTHORIZED, what, {"www-authenticate": "Bearer"})
        elif needed not in caller.scopes:
            what = f"this needs the scope {needed!r}, which the caller lacks"
            await refuse(scope, send, self._metrics, 403, RejectReason.UNAUTHORIZED, what)
        elif seconds := self._wait(caller):
            after = {"retry-after": str(math.ceil(seconds))}
            message = f"expected at most {caller.rate:g} requests a second of this caller, after {caller.burst} at once"
            await refuse(scope, send, self._metrics, 429, RejectReason.RATE_LIMITED, message, after)
        else:
            await self._app(scope, receive, send)

    def _wait(self, caller: Caller) -> float:
        if caller.rate is None:
            return 0.0
        bucket = self._buckets.get(caller.name)
        if bucket is None:
            bucket = self._buckets[caller.name] = Bucket(caller.rate, caller.burst)
            if len(self._buckets) > _CALLERS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(caller.name)
        return bucket.take()


def _given(scope: Scope) -> str:
    """The key or token of a request; empty where there is none, or several."""
    found = []
    for name, value in scope["headers"]:
        text = value.decode("latin-1")
        if name == b"x-api-key":
            found.append(text)
        elif name == b"authorization" and text[:7].lower() == "bearer ":
            found.append(text[7:].strip())
    return found[0] if len(found) == 1 else ""
