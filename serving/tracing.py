# SPDX-License-Identifier: Apache-2.0
"""Traces of requests, as OpenTelemetry has them. Where no exporter is configured nothing is recorded.

Spans hold routes, reasons, flags, counts and versions: values of which there are few, and none that tells who asked for what. Exceptions
are named by their type alone, since a message may quote what was asked.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import NoOpTracer, Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

log = logging.getLogger("serving")

NAME = "serving"
EXPORTERS = "OTEL_TRACES_EXPORTER"
"""The variable that names exporters, separated by commas: ``otlp``, ``console`` or another one that is installed."""

_GROUP = "opentelemetry_traces_exporter"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_OTLP = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
_OTHER = "_OTHER"
_SERVER_ERROR = 500
_OUT = TraceContextTextMapPropagator()
_PARENT = b"traceparent"

Headers = list[tuple[bytes, bytes]]


class Tracing:
    """Makes the spans of an application.

    Args:
        tracer: by default one that records nothing.
    """

    def __init__(self, tracer: Tracer | None = None) -> None:
        self.tracer: Tracer = NoOpTracer() if tracer is None else tracer
        self._off = isinstance(self.tracer, NoOpTracer)

    @contextmanager
    def request(self, scope: Scope) -> Iterator[Span]:
        """The span of an HTTP request, which is the current one inside: a child of the one that its ``traceparent`` names, if it does."""
        if self._off and all(name != _PARENT for name, _ in scope["headers"]):
            yield trace.INVALID_SPAN
            return
        parent = propagate.extract(scope["headers"], Context(), _HEADERS)
        method = _method(scope)
        span = self.tracer.start_span(method, parent, SpanKind.SERVER, {"http.request.method": method})
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            yield span


def responded(span: Span, scope: Scope, route: str | None, status: int, reason: str | None) -> None:
    """Note in a request's span what became of it.

    Args:
        span: see `Tracing.request`.
        scope: of the request.
        route: the pattern of the path; None where there is none.
        status: of the response.
        reason: why it was rejected, if it was.
    """
    if not span.is_recording():
        return
    span.set_attribute("http.response.status_code", status)
    if route is not None:
        span.update_name(f"{_method(scope)} {route}")
        span.set_attribute("http.route", route)
    if reason is not None:
        span.set_attribute("error.type", reason)
    if status >= _SERVER_ERROR:
        span.set_status(Status(StatusCode.ERROR, reason))


def headers_of(span: Span) -> Headers:
    """``traceparent``, and ``tracestate`` where there is one, for whoever gets the response; nothing outside of a trace."""
    if not span.get_span_context().is_valid:
        return []
    carrier: dict[str, str] = {}
    _OUT.inject(carrier, trace.set_span_in_context(span, Context()))
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in carrier.items()]


def trace_id_of(span: Span) -> str | None:
    """The id of its trace, 32 hexadecimal digits; None outside of a trace."""
    context = span.get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else None


def exemplar_of(span: Span) -> dict[str, str] | None:
    """By which a metric names the trace of one of its values; None where the trace is not recorded."""
    if not span.is_recording():
        return None
    return {"trace_id": trace.format_trace_id(span.get_span_context().trace_id)}


def tracing_of_environment() -> Tracing:
    """The tracing of this process, as ``OTEL_*`` says: exporters by `EXPORTERS`, all else as the SDK and the exporters read it.

    An exporter that is not installed is told of, and left out.
    """
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        return Tracing(provider.get_tracer(NAME))
    exporters = _exporters()
    if not exporters:
        return Tracing()
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME)).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "recsys"}))
    provider = TracerProvider(resource=resource)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    # For clients of stores that trace by themselves, too.
    trace.set_tracer_provider(provider)
    return Tracing(provider.get_tracer(NAME))


def _exporters() -> list[SpanExporter]:
    names = [name.strip() for name in os.environ.get(EXPORTERS, "").split(",")]
    found: list[SpanExporter] = []
    for name in names:
        if name in ("", "none"):
            continue
        for entry in entry_points(group=_GROUP, name=_otlp() if name == "otlp" else name):
            found.append(entry.load()())
            break
        else:
            log.warning("%s: the exporter %r is not installed, so no traces go there; that of OTLP is in the extra [otel]", EXPORTERS, name)
    return found


def _otlp() -> str:
    """The exporter of OTLP by its protocol, which is gRPC where none is named, as for the SDK."""
    protocol = next((value for name in _PROTOCOLS if (value := os.environ.get(name, "").strip())), "grpc")
    return _OTLP.get(protocol, protocol)


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else _OTHER


class _Headers(Getter[Any]):
    """Reads the headers of an ASGI scope."""

    def get(self, carrier: Headers, key: str) -> list[str] | None:
        """The values of a header; of a ``traceparent`` that is there several times none, since none of them is the caller's."""
        wanted = key.lower().encode("latin-1")
        found = [value.decode("latin-1") for name, value in carrier if name == wanted]
        return None if not found or (wanted == _PARENT and len(found) > 1) else found

    def keys(self, carrier: Headers) -> list[str]:
        """The names of the headers."""
        return [name.decode("latin-1") for name, _ in carrier]


_HEADERS = _Headers()
