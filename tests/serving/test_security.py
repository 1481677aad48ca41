# SPDX-License-Identifier: Apache-2.0
"""Who may ask, how much and how large; over the layers alone, and over a real server for what only a socket can do."""

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest
import uvicorn
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from recsys.core.config import parse
from recsys.core.errors import ConfigError
from serving.metrics import Metrics
from serving.security import Credentials, Guard, Limits
from serving.security.credentials import PUBLIC_KEY, SECRET, AccessFile
from serving.security.exposure import check_exposure
from serving.security.guard import Bucket
from serving.security.limits import depth_of
from serving.security.protocol import BoundedProtocol
from tests.serving.faults.sockets import tell
from tests.serving.support import settings, wait_until

SECRET_VALUE = "s" * 32
TOKENS = {"algorithm": "HS256", "audience": "recsys", "issuer": "tests"}


def key(name: str, *scopes: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(f"key of {name}".encode()).hexdigest(), "scopes": list(scopes), **more}


def credentials(*keys: dict[str, Any], tokens: dict[str, Any] | None = None, **environment: str) -> Credentials:
    return Credentials(parse(AccessFile, {"keys": list(keys), "tokens": tokens}, source="test"), environment)


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


def app() -> Starlette:
    paths = ("/v1/recommend", "/v1/events", "/metrics", "/livez", "/docs", "/v2/models/recsys/infer")
    return Starlette(routes=[Route(path, echo, methods=["GET", "POST"]) for path in paths])


def guarded(known: Credentials) -> TestClient:
    return TestClient(Guard(app(), known, Metrics()))


def limited(**changed: Any) -> Limits:
    return Limits(app(), Metrics(), **({"most_bytes": 1000, "header_bytes": 2000, "depth": 4, "seconds": 5.0} | changed))


def token(claims: dict[str, Any], secret: Any = SECRET_VALUE, algorithm: str = "HS256") -> dict[str, str]:
    whole = {"exp": time.time() + 60, "aud": "recsys", "iss": "tests", "sub": "me", "scope": "recommend"} | claims
    whole = {name: value for name, value in whole.items() if value is not None}
    return {"authorization": f"Bearer {jwt.encode(whole, secret, algorithm)}"}


def test_a_key_opens_what_its_scopes_name_and_probes_are_open() -> None:
    client = guarded(credentials(key("web", "recommend"), key("scraper", "metrics"), key("root", "admin")))
    opened = {
        name: [path for path in ("/v1/recommend", "/v2/models/recsys/infer", "/v1/events", "/metrics", "/docs") if ok(client, path, name)]
        for name in ("web", "scraper", "root")
    }
    assert opened == {"web": ["/v1/recommend", "/v2/models/recsys/infer"], "scraper": ["/metrics"], "root": ["/docs"]}
    assert client.get("/livez").status_code == 200
    refused = client.get("/v1/events", headers={"x-api-key": "key of web"})
    assert (refused.status_code, refused.json()["error"]) == (403, "unauthorized")


def ok(client: TestClient, path: str, name: str) -> bool:
    answers = {client.get(path, headers=headers).status_code for headers in bearers(f"key of {name}")}
    assert len(answers) == 1, "both headers say the same"
    return answers == {200}


def bearers(value: str) -> list[dict[str, str]]:
    return [{"x-api-key": value}, {"authorization": f"Bearer {value}"}]


@pytest.mark.parametrize("given_", ["", "wrong", "key of web ", "x" * 10_000, key("web", "recommend")["sha256"]])
def test_what_is_no_key_is_told_so(given_: str) -> None:
    client = guarded(credentials(key("web", "recommend")))
    for headers in bearers(given_):
        if "x-api-key" in headers or given_.strip() != "key of web":
            answer = client.get("/v1/recommend", headers=headers)
            assert (answer.status_code, answer.json()["error"]) == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/recommend?x-api-key=key of web").status_code == 401, "no key is taken from an address"


@pytest.mark.parametrize(
    "claims",
    [{"exp": 1}, {"exp": None}, {"aud": "others"}, {"aud": None}, {"iss": "others"}, {"iss": None}, {"sub": None}],
)
def test_a_token_without_the_right_claims_is_refused(claims: dict[str, Any]) -> None:
    client = guarded(credentials(tokens=TOKENS, **{SECRET: SECRET_VALUE}))
    assert client.get("/v1/recommend", headers=token({})).status_code == 200
    assert client.get("/v1/recommend", headers=token(claims)).status_code == 401
    assert client.get("/v1/events", headers=token({"scope": "recommend others"})).status_code == 403
    assert client.get("/v1/recommend", headers=token({"scope": ["recommend"]})).status_code == 403


def test_a_token_of_another_key_or_algorithm_is_refused() -> None:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    client = guarded(credentials(tokens=TOKENS | {"algorithm": "RS256"}, **{PUBLIC_KEY: public}))
    assert client.get("/v1/recommend", headers=token({}, private, "RS256")).status_code == 200
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    assert client.get("/v1/recommend", headers=token({}, other, "RS256")).status_code == 401
    assert client.get("/v1/recommend", headers=token({}, "s" * 40)).status_code == 401
    assert client.get("/v1/recommend", headers=token({}, None, "none")).status_code == 401


def test_a_rate_is_kept_and_each_caller_has_its_own() -> None:
    client = guarded(credentials(key("web", "recommend", rate=0.01, burst=3), key("app", "recommend")))
    codes = [client.get("/v1/recommend", headers={"x-api-key": "key of web"}) for _ in range(5)]
    assert [answer.status_code for answer in codes] == [200, 200, 200, 429, 429]
    assert codes[-1].json()["error"] == "rate_limited" and 0 < int(codes[-1].headers["retry-after"]) <= 100
    assert client.get("/v1/recommend", headers={"x-api-key": "key of app"}).status_code == 200


@given(st.lists(st.floats(0, 5), min_size=1, max_size=60), st.floats(0.1, 5), st.integers(1, 8))
def test_no_more_pass_a_bucket_than_burst_and_rate_allow(pauses: list[float], rate: float, burst: int) -> None:
    now = [0.0]
    bucket = Bucket(rate, burst, lambda: now[0])
    passed = 0
    for pause in pauses:
        now[0] += pause
        wait = bucket.take()
        passed += wait == 0
        assert passed <= burst + rate * now[0] + 1e-6
    if wait:
        now[0] += wait + 1e-6
        assert bucket.take() == 0, "whoever comes back when told to may pass"


@pytest.mark.parametrize(
    ("access", "environment", "message"),
    [
        ({}, {}, "expected keys or tokens"),
        ({"keys": [key("a", "admin"), key("a", "events")]}, {}, "keys: name: expected each once, but 'a'"),
        ({"tokens": TOKENS}, {}, f"needs the variable {SECRET}"),
        ({"tokens": TOKENS}, {SECRET: "short"}, "at least 32 bytes, got 5"),
    ],
)
def test_an_access_file_by_which_nobody_can_be_told_is_refused(access: Any, environment: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Credentials(parse(AccessFile, access, source="test"), environment)


def test_a_server_is_not_opened_to_others_by_accident(tmp_path: Path) -> None:
    file = tmp_path / "access.json"
    file.write_text(json.dumps({"keys": [key("web", "recommend")]}))
    for fine in (
        settings(host="127.0.0.1"),
        settings(host="::1"),
        settings(host="0.0.0.0", insecure=True),
        settings(host="::", access=file),
    ):
        check_exposure(fine)
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.org"):
        with pytest.raises(ConfigError, match="anybody could ask: expected --access FILE"):
            check_exposure(settings(host=host))
    with pytest.raises(ConfigError, match="cannot read"):
        check_exposure(settings(access=tmp_path / "none.json"))


def test_bodies_up_to_the_limit_pass_whole_and_larger_ones_do_not() -> None:
    client = TestClient(limited())
    assert client.post("/v1/recommend", content=b"x" * 1000).text == "1000"
    assert client.post("/v1/recommend", content=(b"x" * 10 for _ in range(100))).text == "1000"
    for large in (b"x" * 1001, (b"x" * 10 for _ in range(101))):
        answer = client.post("/v1/recommend", content=large)
        assert (answer.status_code, answer.json()["error"]) == (413, "invalid_input")
    assert client.get("/v1/recommend", headers={"x-long": "y" * 2000}).status_code == 431


def test_a_body_without_end_is_read_up_to_the_limit_only() -> None:
    read, sent = 0, []

    async def receive() -> Any:
        nonlocal read
        read += 100
        return {"type": "http.request", "body": b"x" * 100, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(limited()({"type": "http", "method": "POST", "path": "/v1/recommend", "headers": []}, receive, send))
    assert sent[0]["status"] == 413 and read == 1100


@given(
    st.recursive(
        st.text('ab[]{}"\\,') | st.none(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('[{"\\'), inner, max_size=3)
    )
)
def test_the_depth_of_json_is_what_a_parser_finds(value: Any) -> None:
    def depth(value: Any) -> int:
        if isinstance(value, dict | list):
            return 1 + max((depth(each) for each in (value.values() if isinstance(value, dict) else value)), default=0)
        return 0

    text = json.dumps(value, ensure_ascii=False).encode()
    assert depth_of(text) == depth(value)
    assert all((depth_of(text, enough) > enough) == (depth(value) > enough) for enough in range(5))


def test_deep_json_is_refused_before_it_is_parsed() -> None:
    client = TestClient(limited(most_bytes=300_000))
    assert client.post("/v1/recommend", content=b"[" * 4 + b"]" * 4).status_code == 200
    answer = client.post("/v1/recommend", content=b"[" * 100_000)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_input")


@contextmanager
def listening(application: Any, monkeypatch: pytest.MonkeyPatch, **bounds: str) -> Iterator[int]:
    from serving.security import protocol

    for name, value in bounds.items():
        monkeypatch.setenv(f"RECSYS_SERVE_{name.upper()}", value)
    protocol._bounds.cache_clear()
    server = uvicorn.Server(uvicorn.Config(application, port=0, http=BoundedProtocol, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        protocol._bounds.cache_clear()


HEAD = b"POST /v1/recommend HTTP/1.1\r\nhost: test\r\n"


def test_slow_and_endless_requests_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(limited(seconds=0.5), monkeypatch, head_seconds="0.5", header_bytes="4000") as port:
        good = tell(port, HEAD + b"content-length: 3\r\nconnection: close\r\n\r\nabc").answer
        assert good.startswith(b"HTTP/1.1 200") and good.endswith(b"\r\n\r\n3")
        for name, parts, pause, status in (
            ("nothing", (), 0.0, b"408"),
            ("a head drop by drop", tuple(bytes([byte]) for byte in HEAD), 0.05, b"408"),
            ("half a head", (HEAD,), 0.0, b"408"),
            ("a body drop by drop", (HEAD + b"content-length: 900\r\n\r\n", *[b"x"] * 30), 0.05, b"408"),
            ("a head without end", (HEAD, *[b"x-more: " + b"y" * 1000 + b"\r\n"] * 8), 0.0, b"431"),
            ("one header without end", (HEAD + b"x-long: ", *[b"y" * 1000] * 8), 0.0, b"431"),
        ):
            told = tell(port, *parts, pause=pause, seconds=10.0)
            assert told.answer.startswith(b"HTTP/1.1 " + status) or (status == b"431" and told.answer == b""), (name, told.answer)
            assert told.seconds < 5, name


def test_a_gigabyte_is_refused_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(limited(), monkeypatch) as port:
        told = tell(port, HEAD + b"content-length: 1000000000\r\n\r\n", b"x" * 10_000, seconds=10.0)
        assert told.answer.startswith(b"HTTP/1.1 413") and told.seconds < 5
        chunks = (b"fff\r\n" + b"x" * 4095 + b"\r\n" for _ in range(3))
        told = tell(port, HEAD + b"transfer-encoding: chunked\r\n\r\n", *chunks, seconds=10.0)
        assert (told.answer.startswith(b"HTTP/1.1 413") or told.answer == b"") and told.seconds < 5
