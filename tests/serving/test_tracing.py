# SPDX-License-Identifier: Apache-2.0
"""SV-10: the spans of a request by the SDK's in-memory exporter, whose parent is the one that was sent; and what stands in none of them."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NoOpTracer, StatusCode, get_current_span
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from serving.app import create_app
from serving.engine import Engine, Loaded
from serving.tracing import EXPORTERS, Tracing, tracing_of_environment
from tests.serving.support import KNOWN, Faulty, Switch, settings, together, wait_until, work

Load = Callable[..., Loaded]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SENT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
# Every attribute that a span may have: what has few values, and tells nothing of who asked.
ATTRIBUTES = {
    "http.request.method",
    "http.route",
    "http.response.status_code",
    "error.type",
    "recsys.kind",
    "recsys.version",
    "recsys.candidates",
    "recsys.flags",
    "recsys.fallback",
    "recsys.fallback.reason",
    "recsys.requests",
    "recsys.rows",
}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def tracing(exporter: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider.get_tracer("tests"))


@contextmanager
def serving(source: Any, made: Tracing | None = None, more: Any = (), **changed: Any) -> Iterator[tuple[Engine, TestClient]]:
    engine = Engine(source, settings(**changed), tracing=made)
    with TestClient(create_app(engine, engine.settings, more=more), raise_server_exceptions=False) as client:
        wait_until(lambda: engine.loaded is not None)
        yield engine, client


def spans_of(exporter: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    """By name; what a span may not say is looked for in all of them."""
    found: dict[str, list[ReadableSpan]] = defaultdict(list)
    for span in exporter.get_finished_spans():
        assert set(span.attributes) <= ATTRIBUTES and not span.events, "an event would quote an exception"
        found[span.name].append(span)
    exporter.clear()
    return found


def below(span: ReadableSpan, found: dict[str, list[ReadableSpan]]) -> dict[str, ReadableSpan]:
    return {each.name: each for named in found.values() for each in named if each.parent and each.parent.span_id == span.context.span_id}


def test_a_request_is_a_tree_of_its_stages_below_the_span_that_was_sent(load: Load, exporter: InMemorySpanExporter) -> None:
    with serving(Switch(v1=load), tracing(exporter)) as (engine, client):
        response = client.post("/v1/recommend", json={"user_id": KNOWN[3], "k": 4}, headers=SENT)
        answer = response.json()
        loaded = engine.loaded
    told = "".join(span.to_json() for span in exporter.get_finished_spans())
    found = spans_of(exporter)
    (server,), (asked,) = found["POST /v1/recommend"], found["answer"]
    assert (f"{server.context.trace_id:032x}", f"{server.parent.span_id:016x}", server.parent.is_remote) == (TRACE, PARENT, True)
    assert all(f"{span.context.trace_id:032x}" == TRACE for named in found.values() for span in named)
    assert dict(server.attributes) == {"http.request.method": "POST", "http.route": "/v1/recommend", "http.response.status_code": 200}
    assert below(server, found).keys() == {"answer"}
    stages = below(asked, found)
    (batch,) = found["batch"]
    assert stages.pop("batch") is batch
    assert stages.keys() == answer["stages_ms"].keys() == {"queue", "features", "retrieve", "items", "rank", "respond", "explain"}
    for name, span in stages.items():
        assert (span.end_time - span.start_time) / 1e6 == pytest.approx(answer["stages_ms"][name], abs=1e-3), name
        assert span.end_time <= asked.end_time + 1_000_000
    rows = loaded.recommender.wanted([work(KNOWN[3], k=4).request])
    expected = {"recsys.kind": "recommend", "recsys.version": 1, "recsys.candidates": rows, "recsys.flags": ()}
    assert dict(asked.attributes) == expected
    # It is given on: whoever gets the response knows the trace, and the server's span in it.
    assert response.headers["traceparent"] == f"00-{TRACE}-{server.context.span_id:016x}-{server.context.trace_flags:02x}"
    assert response.headers["tracestate"] == "vendor=1"
    assert answer["request_id"] not in told and answer["items"][0]["title"] not in told and loaded.sha256 not in told


def test_mates_of_a_batch_are_linked_from_it(load: Load, exporter: InMemorySpanExporter) -> None:
    made = tracing(exporter)
    with serving(Switch(v1=load), made, max_delay_ms=300) as (engine, _):
        together(engine, [work(user) for user in KNOWN[:4]])
    found = spans_of(exporter)
    (batch,) = found["batch"]
    assert batch.attributes["recsys.requests"] == len(found["answer"]) == 4
    ids = {span.context.span_id for span in found["answer"]}
    assert {link.context.span_id for link in batch.links} == ids and batch.parent.span_id in ids
    assert len({span.context.trace_id for span in found["answer"]}) == 4, "each its own trace"
    for span in found["answer"]:
        assert {"queue", "features", "retrieve", "items", "rank", "respond"} <= below(span, found).keys()


def test_the_store_is_read_inside_of_the_batchs_span(load: Load, faulty: Faulty, exporter: InMemorySpanExporter) -> None:
    seen = []

    def noting(table: Any) -> Any:
        seen.append(get_current_span().get_span_context())
        return table

    with serving(Switch(v1=lambda: load(reader=faulty)), tracing(exporter)) as (_, client):
        faulty.garbage = noting
        client.post("/v1/recommend", json={"user_id": KNOWN[0]}, headers=SENT)
        faulty.heal()
    (batch,) = spans_of(exporter)["batch"]
    assert {context.span_id for context in seen} == {batch.context.span_id}, "so that a client which traces itself stands in the trace"


def test_a_fallback_says_why(load: Load, faulty: Faulty, exporter: InMemorySpanExporter) -> None:
    source = Switch(v1=lambda: load(reader=faulty))

    def asked(client: TestClient, user: str, **more: Any) -> tuple[Any, Any]:
        exporter.clear()
        assert client.post("/v1/recommend", json={"user_id": user, "explain": False, **more}).status_code == 200
        (span,) = spans_of(exporter)["answer"]
        assert span.status.status_code is StatusCode.UNSET
        return span.attributes.get("recsys.fallback"), span.attributes.get("recsys.fallback.reason")

    with serving(source, tracing(exporter), breaker_failures=3, breaker_seconds=60) as (engine, client):
        assert asked(client, KNOWN[0]) == (None, None)
        faulty.error = OSError("the store of user 0 is gone")
        assert asked(client, KNOWN[0]) == (("cached_features", "retriever_only"), ("features: failed", "items: failed"))
        assert asked(client, "never seen") == (("popular",), ("features: failed",))
        wait_until(lambda: engine.breaker.open)
        assert asked(client, "never seen") == (("popular",), ("features: left alone",))
    faulty.heal()
    with serving(source, tracing(exporter)) as (_, client):
        asked(client, KNOWN[0])
        faulty.services, faulty.error = {"item"}, OSError("gone")
        assert asked(client, KNOWN[0]) == (("retriever_only",), ("items: failed",))
        faulty.heal()
        faulty.services, faulty.delay = {"user"}, 1.0
        assert asked(client, "nobody", deadline_ms=400) == (("popular",), ("features: too slow",))


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{PARENT}",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01" + "x" * 600,
    ],
)
def test_a_traceparent_that_is_none_is_ignored(exporter: InMemorySpanExporter, sent: str) -> None:
    with TestClient(create_app(Engine(Switch(), settings(), tracing=tracing(exporter)), settings())) as client:
        response = client.get("/livez", headers={"traceparent": sent})
    (span,) = spans_of(exporter)["GET /livez"]
    assert span.parent is None and f"{span.context.trace_id:032x}" != TRACE
    assert response.headers["traceparent"].startswith(f"00-{span.context.trace_id:032x}-")


def test_of_two_parents_none_is_taken_and_one_that_is_not_sampled_is_not_recorded(exporter: InMemorySpanExporter) -> None:
    with TestClient(create_app(Engine(Switch(), settings(), tracing=tracing(exporter)), settings())) as client:
        client.get("/livez", headers=[("traceparent", SENT["traceparent"]), ("traceparent", SENT["traceparent"])])
        (span,) = spans_of(exporter)["GET /livez"]
        assert span.parent is None
        response = client.get("/livez", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
        assert not exporter.get_finished_spans()
        given = response.headers["traceparent"].split("-")
        assert given[1] == TRACE and given[3] == "00", "whoever is called next does not record it either"


def test_without_an_exporter_nothing_is_recorded_and_a_trace_passes_through(load: Load) -> None:
    with serving(Switch(v1=load)) as (engine, client):
        assert isinstance(engine.tracing.tracer, NoOpTracer)
        response = client.post("/v1/recommend", json={"user_id": KNOWN[0]}, headers=SENT)
        assert response.status_code == 200 and response.headers["traceparent"] == SENT["traceparent"]
        assert "traceparent" not in client.get("/livez").headers


def test_what_is_rejected_or_fails_says_so_by_reason_and_not_by_message(load: Load, exporter: InMemorySpanExporter) -> None:
    def failing(*_: Any) -> APIRouter:
        router = APIRouter()

        @router.get("/fails")
        async def fails() -> None:
            raise RuntimeError("of user 42")

        return router

    with serving(Switch(v1=load), tracing(exporter), more=(failing,)) as (_, client):
        client.post("/v1/recommend", json={"user_id": "42", "k": 0})
        (server,) = spans_of(exporter)["POST /v1/recommend"]
        assert (server.attributes["error.type"], server.status.status_code) == ("invalid_input", StatusCode.UNSET)
        client.post("/v1/rank", json={"user_id": "42", "item_ids": ["no such item"]})
        found = spans_of(exporter)
        assert found["answer"][0].attributes["error.type"] == found["POST /v1/rank"][0].attributes["error.type"] == "invalid_input"
        assert client.get("/fails").status_code == 500
        (server,) = spans_of(exporter)["GET /fails"]
        assert (server.attributes["error.type"], server.status.status_code) == ("internal", StatusCode.ERROR)
        assert "42" not in server.to_json()[server.to_json().index('"attributes"') : server.to_json().index('"resource"')]
        client.request("BREW", "/no/such/path/42")
        (server,) = spans_of(exporter)["_OTHER"]
        assert dict(server.attributes) == {"http.request.method": "_OTHER", "http.response.status_code": 404, "error.type": "invalid_input"}


def test_latencies_have_exemplars_where_a_scraper_accepts_openmetrics(load: Load, exporter: InMemorySpanExporter) -> None:
    with serving(Switch(v1=load), tracing(exporter)) as (_, client):
        client.post("/v1/recommend", json={"user_id": KNOWN[0]}, headers=SENT)
        response = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
        plain = client.get("/metrics")
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    for name, label in (("recsys_request_seconds", ("route", "/v1/recommend")), ("recsys_stage_seconds", ("stage", "rank"))):
        exemplars = [s.exemplar for s in families[name].samples if s.exemplar is not None and s.labels[label[0]] == label[1]]
        assert [exemplar.labels for exemplar in exemplars] == [{"trace_id": TRACE}]
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4") and TRACE not in plain.text


def traced_process(**environment: str) -> list[dict[str, Any]]:
    """The spans that a process exports whose tracing is that of its environment."""
    lines = "from serving.tracing import tracing_of_environment; tracing_of_environment().tracer.start_span('one').end()"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", lines], cwd=root, env=clean | environment, capture_output=True, text=True, check=True)
    found, text = [], done.stdout.strip()
    while text:
        span, end = json.JSONDecoder().raw_decode(text)
        found, text = [*found, span], text[end:].strip()
    return found


def test_the_environment_configures_it_as_the_sdk_reads_it() -> None:
    (span,) = traced_process(**{EXPORTERS: "console"})
    assert span["name"] == "one" and span["resource"]["attributes"]["service.name"] == "recsys"
    (span,) = traced_process(**{EXPORTERS: "console", "OTEL_SERVICE_NAME": "mine"})
    assert span["resource"]["attributes"]["service.name"] == "mine"
    assert traced_process(**{EXPORTERS: "console", "OTEL_TRACES_SAMPLER": "always_off"}) == []
    assert traced_process(**{EXPORTERS: "console", "OTEL_SDK_DISABLED": "true"}) == []


@pytest.mark.parametrize("named", [None, "", "none"])
def test_no_exporter_is_no_recording(monkeypatch: pytest.MonkeyPatch, named: str | None) -> None:
    monkeypatch.delenv(EXPORTERS, raising=False)
    if named is not None:
        monkeypatch.setenv(EXPORTERS, named)
    assert isinstance(tracing_of_environment().tracer, NoOpTracer)


def test_an_exporter_that_is_not_installed_is_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(EXPORTERS, "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "by_pigeon")
    assert isinstance(tracing_of_environment().tracer, NoOpTracer)
    assert "the exporter 'otlp' is not installed" in caplog.text and "[otel]" in caplog.text
