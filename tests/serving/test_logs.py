# SPDX-License-Identifier: Apache-2.0
"""Logs: a line for every request that names it, and nothing of who asked, for what, or by which key."""

import hashlib
import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import APIRouter
from opentelemetry.sdk.trace import TracerProvider

from recsys.core.errors import DataError
from recsys.inference.request import InvalidRequest
from serving.app import create_app
from serving.engine import Engine, Loaded
from serving.logs import FIELDS, JsonLines, TextLines, configure_logs, named
from serving.settings import Settings
from serving.tracing import Tracing
from tests.serving.support import KNOWN, Faulty, Switch, settings, wait_until

Load = Callable[..., Loaded]
USER, ITEM, TITLE, KEY, TOKEN, BODY = (f"planted-{what}-7361" for what in ("user", "item", "title", "key", "token", "body"))
PLANTED = (USER, ITEM, TITLE, KEY, TOKEN, BODY, "planted")
FIELD_NAMES = {"request_id", "trace_id", "route", "status", "reason", "milliseconds", "version", "flags"}


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """All that this process logs as a server, as JSON lines; it is its own client as well, which logs the addresses that it asks."""
    monkeypatch.setattr(logging.getLogger("httpx"), "disabled", True)
    stream, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(stream), root.level
    handler.setFormatter(JsonLines())
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


def lines(stream: io.StringIO, **wanted: Any) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [line for line in found if wanted.items() <= line.items()]


def failing(engine: Engine, _: Settings) -> APIRouter:
    router = APIRouter()

    @router.get("/fails/{user}")
    async def fails(user: str) -> None:
        try:
            raise KeyError(user)
        except KeyError as error:
            raise RuntimeError(f"of {user}") from error

    return router


@contextmanager
def listening(application: Any) -> Iterator[str]:
    """A real server, whose own logs count as well."""
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_config=None, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def test_nothing_that_was_planted_is_in_the_log_and_every_error_has_its_line(
    load: Load, faulty: Faulty, logged: io.StringIO, tmp_path: Path
) -> None:
    scopes = ["recommend", "events", "metrics", "admin"]
    access = {"keys": [{"name": "web", "sha256": hashlib.sha256(KEY.encode()).hexdigest(), "scopes": scopes}]}
    (tmp_path / "access.json").write_text(json.dumps(access))
    tracing = Tracing(TracerProvider(shutdown_on_exit=False).get_tracer("tests"))
    told: list[str] = []

    def hook(served: Any) -> None:
        told.append(served.request_id)
        raise ValueError(f"no room for {served.request.user_id}")

    engine = Engine(
        Switch(v1=lambda: load(reader=faulty)), settings(access=tmp_path / "access.json", body_bytes=2000), on_answer=hook, tracing=tracing
    )
    answers: list[httpx.Response] = []
    with listening(create_app(engine, engine.settings, more=(failing,))) as address:
        wait_until(lambda: engine.loaded is not None)
        with httpx.Client(base_url=address, headers={"x-api-key": KEY}, timeout=60, trust_env=False) as client:

            def ask(method: str, path: str, **more: Any) -> None:
                answers.append(client.request(method, path, **more))

            ask("POST", "/v1/recommend", json={"user_id": USER, "rules": {"exclude": [ITEM]}})
            ask("POST", "/v1/rank", json={"user_id": USER, "item_ids": ["5", "50"]})
            ask("POST", "/v1/rank", json={"user_id": USER, "item_ids": [ITEM]})
            ask("POST", "/v1/similar", json={"item_id": ITEM})
            ask("POST", "/v1/recommend", json={"user_id": USER, "k": 0, BODY: BODY})
            ask("POST", "/v1/recommend", content='{"user_id": "' + BODY, headers={"content-type": "application/json"})
            ask("POST", "/v1/recommend", json={"user_id": USER}, headers={"x-deadline-ms": BODY})
            ask("POST", "/v1/recommend", json={"user_id": USER}, headers={"x-api-key": f"{KEY} no more"})
            ask("POST", "/v1/recommend", json={"user_id": USER}, headers={"x-api-key": "", "authorization": f"Bearer {TOKEN}"})
            ask("POST", "/v1/recommend", content=BODY.encode() * 200)
            event = {"event_id": "e1", "user_id": USER, "item_id": ITEM, "time": "2026-01-01T12:00:00Z"}
            ask("POST", "/v1/events", json=event)
            ask("POST", "/v1/events", json={**event, "time": BODY})
            ask("GET", f"/page/items?q={TITLE}")
            ask("GET", f"/page/users?q={USER}")
            ask("POST", "/page/what-if", json={"user_id": USER, "history": [ITEM], "k": 3})
            ask("POST", "/invocations", json={"inputs": [{"user_id": USER, "k": BODY}]})
            ask("POST", f"/v2/models/{BODY}/infer", json={})
            ask("GET", f"/no/such/{USER}")
            ask("GET", f"/fails/{USER}")
            faulty.error = OSError(f"no row of {USER}")
            ask("POST", "/v1/recommend", json={"user_id": USER})
            faulty.error = None
            faulty.garbage = lambda table: {USER: table}
            ask("POST", "/v1/recommend", json={"user_id": USER})
            faulty.heal()
    text = logged.getvalue()
    assert not [word for word in PLANTED if word in text]
    codes = [answer.status_code for answer in answers]
    assert {200, 400, 401, 404, 413, 422, 500, 503} <= set(codes)
    for answer in answers:
        request_id = answer.headers["x-request-id"]
        (line,) = lines(logged, logger="serving.requests", request_id=request_id)
        assert line.keys() >= FIELD_NAMES and line["status"] == answer.status_code and line["milliseconds"] > 0
        assert len(line["trace_id"]) == 32
        assert line["level"] == ("warning" if answer.status_code >= 500 else "info")
        assert line["reason"] == (answer.json()["error"] if answer.status_code >= 400 else None)
    listed = lines(logged, logger="serving.requests", route="/v1/recommend", status=200)
    assert all(line["version"] == 1 for line in listed) and listed[0]["flags"] == ["new_user"]
    assert any("cached_features" in line["flags"] or "popular" in line["flags"] for line in listed)
    # What went wrong inside is there by type and place.
    (internal,) = lines(logged, message="internal error")
    assert [cause["type"] for cause in internal["exception"]] == ["RuntimeError", "KeyError"]
    assert (
        internal["exception"][0]["at"][-1].endswith(" fails")
        and internal["request_id"] == answers[codes.index(500)].headers["x-request-id"]
    )
    assert lines(logged, message="reading features failed: OSError")
    assert told and len([line for line in lines(logged) if line["message"].startswith("the hook of answers failed")]) == len(told)


def test_probes_have_a_line_where_they_fail_and_others_may_be_left_out(load: Load, logged: io.StringIO) -> None:
    engine = Engine(Switch(v1=load), settings(log_requests="errors"))
    with listening(create_app(engine, engine.settings)) as address:
        wait_until(lambda: engine.loaded is not None)
        with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            assert client.post("/v1/recommend", json={"user_id": KNOWN[0]}, headers={"x-request-id": "good"}).status_code == 200
            assert client.get("/readyz").status_code == 200
            engine.drain()
            assert client.get("/readyz", headers={"x-request-id": "probe"}).status_code == 503
            refused = client.post("/v1/recommend", json={}, headers={"x-request-id": "bad"})
    assert refused.headers["x-request-id"] == "bad"
    assert [line["request_id"] for line in lines(logged, logger="serving.requests")] == ["probe", "bad"]
    assert lines(logged, logger="serving.requests")[0]["trace_id"] is None


def record(form: logging.Formatter, message: str, *values: Any, logger: str = "serving", error: Any = None, **fields: Any) -> str:
    made = logging.LogRecord(logger, logging.WARNING, "file.py", 1, message, values, None if error is None else (type(error), error, None))
    setattr(made, FIELDS, fields)
    return form.format(made)


def test_a_line_is_one_line_whatever_is_in_it() -> None:
    for form in (JsonLines(), TextLines()):
        assert "\n" not in record(form, "asked\nfor %s", "x", logger="asyncio", status=200)
    line = json.loads(record(JsonLines(), 'it said "%s"', "no\nmore", status=200, missing=None))
    assert (line["message"], line["status"], line["missing"], line["level"]) == ('it said "no\nmore"', 200, None, "warning")
    text = record(TextLines(), "request", status=200, missing=None, error=ValueError("secret"))
    assert text.splitlines()[0].endswith("serving WARNING request status=200") and "ValueError" in text and "secret" not in text
    task = record(JsonLines(), "Task exception was never retrieved\nfuture: <Task exception=KeyError('secret')>", logger="asyncio")
    assert "secret" not in task


def test_an_error_is_named_by_its_message_only_where_it_quotes_nobody() -> None:
    assert named(DataError("column 'a' is missing")) == "DataError: column 'a' is missing"
    assert named(InvalidRequest(f"user_id: {USER}")) == "InvalidRequest"
    assert named(KeyError(USER)) == "KeyError"


@pytest.mark.parametrize("form", ["json", "text"])
def test_the_form_is_a_setting(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        root.handlers = []
        configure_logs(Settings.from_environment({"RECSYS_SERVE_LOG_FORMAT": form}).log_format)
        logging.getLogger("serving").info("live", extra={FIELDS: {"version": 3}})
    finally:
        root.handlers = before
        root.setLevel(level)
    (line,) = capsys.readouterr().err.splitlines()
    if form == "json":
        assert json.loads(line).items() >= {"message": "live", "version": 3, "logger": "serving"}.items()
    else:
        assert line.endswith("serving INFO live version=3")
