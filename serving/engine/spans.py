# SPDX-License-Identifier: Apache-2.0
"""The spans of what the engine does for a request: ``answer``, below it each stage, and ``batch`` for whatever was computed together."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, Status, StatusCode

from serving.engine.entry import Entry
from serving.engine.work import FALLBACKS, Answer, Rejected, Work
from serving.tracing import Tracing

_SERVER_ERROR = 500


@contextmanager
def answering(tracing: Tracing, work: Work) -> Iterator[Span]:
    """The span of one request to the engine, below the current one; it says for which reason the request was rejected, if it was."""
    span = tracing.tracer.start_span("answer", attributes={"recsys.kind": "recommend" if work.item_ids is None else "rank"})
    try:
        yield span
    except Rejected as error:
        span.set_attribute("error.type", error.reason.value)
        if error.status >= _SERVER_ERROR:
            span.set_status(Status(StatusCode.ERROR, error.reason.value))
        raise
    except asyncio.CancelledError:
        span.set_attribute("error.type", "cancelled")
        raise
    finally:
        span.end()


def ended(tracing: Tracing, entry: Entry, outcome: Answer | Rejected) -> None:
    """Tell the span of a request how it was answered, and add its stages."""
    span = entry.span
    if not span.is_recording():
        return
    span.set_attribute("recsys.version", entry.loaded.version)
    span.set_attribute("recsys.candidates", entry.rows)
    if isinstance(outcome, Answer):
        flags = outcome.response.flags
        span.set_attribute("recsys.flags", flags)
        if left_out := [flag for flag in flags if flag in FALLBACKS]:
            span.set_attribute("recsys.fallback", left_out)
            span.set_attribute("recsys.fallback.reason", outcome.why)
    # Stages are timed by the monotonic clock, and spans by the other one.
    apart, below = time.time_ns() - time.monotonic_ns(), trace.set_span_in_context(span, Context())
    for stage, began, end in tuple(entry.known.intervals):
        tracing.tracer.start_span(stage, below, start_time=apart + _nanoseconds(began)).end(apart + _nanoseconds(end))


@contextmanager
def batch(tracing: Tracing, entries: Sequence[Entry], rows: int) -> Iterator[None]:
    """The span of a batch, which links to the spans of all its requests that are recorded; the current one inside.

    It stands in the trace of the first of them, so that whoever chose that trace has chosen it as well.
    """
    spans = [entry.span for entry in entries if entry.span.is_recording()]
    if not spans:
        yield
        return
    with tracing.tracer.start_as_current_span(
        "batch",
        trace.set_span_in_context(spans[0], Context()),
        links=[Link(span.get_span_context()) for span in spans],
        attributes={"recsys.requests": len(entries), "recsys.rows": rows, "recsys.version": entries[0].loaded.version},
        record_exception=False,
        set_status_on_exception=False,
    ):
        yield


def _nanoseconds(seconds: float) -> int:
    return round(1e9 * seconds)
