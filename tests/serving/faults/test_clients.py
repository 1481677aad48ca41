# SPDX-License-Identifier: Apache-2.0
"""Clients that ask wrongly, slowly, endlessly, or that go: each is refused in the fixed form, and takes nothing from whoever comes next."""

import hashlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import psutil
import pytest

from recsys.registry import Location
from serving.engine import Hosting, RegistrySource
from tests.serving.faults.served import TOGETHER, Server, served
from tests.serving.faults.sockets import leave, post, pour, tell
from tests.serving.support import wait_until

SECONDS = 0.6
"""For heads and bodies to come; ten seconds by default."""
POSTED = ("/v1/recommend", "/v1/rank", "/v1/similar", "/v1/events", "/invocations", "/v2/models/recsys/infer")
HEAD = b"POST /v1/recommend HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
GOOD = b'{"user_id": "2", "k": 5}'
GIGABYTE = 10**9


@pytest.fixture(scope="module")
def server(tiny_run: Any) -> Iterator[Server]:
    source = RegistrySource("models:/recsys@champion", Location.under(tiny_run.home), Hosting(events="held", held_events=50))
    bounds = {"head_seconds": str(SECONDS), "header_bytes": "4000"}
    with served(source, bounds=bounds, body_seconds=SECONDS, header_bytes=4000) as server:
        yield server


UNREADABLE = {
    "nothing": b"",
    "no JSON": b"{not json",
    "half of it": b'{"user_id": "2"',
    "something behind it": GOOD + b"]",
    "100,000 lists within each other": b'{"user_id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 objects within each other": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "100,000 lists that never end": b"[" * 100_000,
    "NaN": b'{"user_id": "2", "deadline_ms": NaN}',
    "Infinity": b'{"user_id": "2", "deadline_ms": Infinity}',
    "-Infinity": b'{"user_id": "2", "k": -Infinity}',
    "a key twice": b'{"user_id": "2", "user_id": "3"}',
    "a key of an inner object twice": b'{"user_id": "2", "rules": {"diversity": 0, "diversity": 1}}',
    "no UTF-8": b'{"user_id": "\xff\xfe"}',
    "half a character": b'{"user_id": "\xc3"}',
    "UTF-16": GOOD.decode().encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "a number of 5,000 digits": b'{"user_id": "2", "k": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("path", POSTED)
@pytest.mark.parametrize("fault", UNREADABLE)
def test_a_body_that_is_no_json_is_refused(server: Server, path: str, fault: str) -> None:
    told = tell(server.port, post(UNREADABLE[fault], path))
    told.is_refusal(422 if fault == "nothing" and path.startswith("/v1") else 400)
    assert told.body["error"] == "invalid_input"


MEANINGLESS: dict[str, dict[str, Any]] = {
    "a list": {"/v1/recommend": []},
    "a string": {"/v1/recommend": "2"},
    "null": {"/v1/recommend": None},
    "an empty object": {"/v1/recommend": {}},
    "a number as an id": {"/v1/recommend": {"user_id": 2}},
    "a text as a number": {"/v1/recommend": {"user_id": "2", "k": "five"}},
    "a list as an id": {"/v1/recommend": {"user_id": ["2"]}},
    "a fraction of an item": {"/v1/recommend": {"user_id": "2", "k": 1.5}},
    "a number that no float has": {"/v1/recommend": {"user_id": "2", "deadline_ms": 10**400}},
    "a field that nobody knows": {"/v1/recommend": {"user_id": "2", "kk": 1}},
    "a user id of 10,000 characters": {"/v1/recommend": {"user_id": "2" * 10_000}},
    "half a surrogate pair": {"/v1/recommend": {"user_id": "\ud800"}},
    "an item that is not there": {"/v1/rank": {"user_id": "2", "item_ids": ["no such item"]}},
    "10,000 items": {"/v1/rank": {"user_id": "2", "item_ids": ["1"] * 10_000}},
    "an item like none": {"/v1/similar": {"item_id": "no such item"}},
    "a rating of infinity": {
        "/v1/events": {"event_id": "e", "user_id": "2", "item_id": "1", "time": "2026-01-01T12:00:00Z", "values": {"rating": 1e400}}
    },
    "a time without a zone": {"/v1/events": {"event_id": "e", "user_id": "2", "item_id": "1", "time": "2026-01-01T12:00:00"}},
    "a row without a user": {"/invocations": {"inputs": [{"k": 5}]}},
    "a tensor of another type": {
        "/v2/models/recsys/infer": {"inputs": [{"name": "user_id", "shape": [1], "datatype": "FP32", "data": [1.0]}]}
    },
}


@pytest.mark.parametrize("fault", MEANINGLESS)
def test_a_body_that_means_nothing_is_refused_with_its_field(server: Server, fault: str) -> None:
    ((path, value),) = MEANINGLESS[fault].items()
    body = json.dumps(value).replace("Infinity", "1e400").encode()
    tell(server.port, post(body, path)).is_refusal(422)


WRONG_HTTP: dict[str, tuple[bytes, int]] = {
    "text": (post(GOOD, kind="text/plain"), 415),
    "a form": (post(b"user_id=2", kind="application/x-www-form-urlencoded"), 415),
    "no media type": (post(GOOD, kind=None), 415),
    "a table for MLflow's protocol": (post(b"user_id\n2\n", "/invocations", kind="text/csv"), 415),
    "another method": (post(b"", method="GET"), 405),
    "a method that is none": (post(GOOD, method="BREW"), 400),
    "another path": (post(GOOD, "/v1/recommends"), 404),
    "a version that is not there": (post(GOOD, "/v2/models/recsys/versions/99/infer"), 404),
    "a slash too many": (post(GOOD, "/v1/recommend/"), 404),
    "a header of 100,000 bytes": (post(GOOD, "/v1/recommend", "x-long: " + "x" * 100_000), 431),
    "a header just above the limit": (post(GOOD, "/v1/recommend", "x-long: " + "x" * 4000), 431),
    "200 headers": (post(GOOD, "/v1/recommend", *(f"x-{n}: {n}" for n in range(200))), 431),
    "a length that is none": (post(GOOD, "/v1/recommend", "content-length: five", length=False), 400),
    "a negative length": (post(GOOD, "/v1/recommend", "content-length: -5", length=False), 400),
    "two lengths": (post(GOOD, "/v1/recommend", "content-length: 5"), 400),
    "a length and chunks": (post(GOOD, "/v1/recommend", "transfer-encoding: chunked"), 400),
    "a chunk that is none": (post(b"zz\r\n", "/v1/recommend", "transfer-encoding: chunked", length=False), 400),
    "a header without a name": (post(GOOD, "/v1/recommend", ": x"), 400),
    "a header with a NUL": (post(GOOD, "/v1/recommend", "x-bad: a\0b"), 400),
    "TLS": (bytes.fromhex("16030100c8010000c40303") + bytes(200), 400),
    "another protocol": (b"*1\r\n$4\r\nPING\r\n", 400),
    "an address beyond ASCII": (b"GET /\xff HTTP/1.1\r\nhost: test\r\n\r\n", 400),
    "a deadline that is none": (post(GOOD, "/v1/recommend", "x-deadline-ms: soon"), 422),
    "a gigabyte that is announced": (post(b"", "/v1/recommend", f"content-length: {GIGABYTE}", length=False), 413),
    "10¹⁸ bytes that are announced": (post(b"", "/v1/recommend", f"content-length: {10**18}", length=False), 413),
    "an upgrade to a WebSocket": (
        post(b"", "/v1/recommend", "upgrade: websocket", "connection: upgrade", "sec-websocket-version: 13", method="GET", kind=None),
        405,
    ),
}


@pytest.mark.parametrize("fault", WRONG_HTTP)
def test_what_is_wrong_in_http_itself_is_refused(server: Server, fault: str) -> None:
    sent, status = WRONG_HTTP[fault]
    tell(server.port, sent).is_refusal(status)


def test_all_of_these_together_lose_nothing(server: Server) -> None:
    wrong = [post(body, path) for path in POSTED for body in UNREADABLE.values()] + [sent for sent, _ in WRONG_HTTP.values()]
    with server.loses_nothing(), ThreadPoolExecutor(TOGETHER) as pool:
        told = list(pool.map(lambda sent: tell(server.port, sent), wrong))
        assert [sent[:300] for sent, each in zip(wrong, told, strict=True) if not each.answer.startswith(b"HTTP/1.1 4")] == []


DRIP = [bytes([byte]) for byte in HEAD]
SLOW: dict[str, tuple[tuple[bytes, ...], float, list[int]]] = {
    "nothing is said": ((), 0.0, [408]),
    "a head byte by byte": (tuple(DRIP), 0.05, [408]),
    "half a head": ((HEAD,), 0.0, [408]),
    "empty lines": ((b"\r\n",) * 40, 0.05, [408]),
    "a body byte by byte": ((HEAD + b"content-length: 900\r\n\r\n", *[b"x"] * 40), 0.05, [408]),
    "half a body": ((HEAD + b"content-length: 900\r\n\r\n{",), 0.0, [408]),
    "chunks byte by byte": ((HEAD + b"transfer-encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n"] * 40), 0.05, [408]),
    "a chunk of which nothing comes": ((HEAD + b"transfer-encoding: chunked\r\n\r\nfff\r\n",), 0.0, [408]),
    "a head without end": ((HEAD, *[b"x-more: " + b"y" * 1000 + b"\r\n"] * 8), 0.0, [431]),
    "one header without end": ((HEAD + b"x-long: ", *[b"y" * 1000] * 8), 0.0, [431]),
    "a line without end": ((b"GET /", *[b"y" * 1000] * 8), 0.0, [431]),
}


@pytest.mark.parametrize("fault", SLOW)
def test_slow_and_endless_requests_are_given_up(server: Server, fault: str) -> None:
    parts, pause, statuses = SLOW[fault]
    with server.loses_nothing():
        told = tell(server.port, *parts, pause=pause)
        assert told.seconds < 10 * SECONDS
        told.is_refusal(statuses[0])


def statuses(answers: bytes) -> list[int]:
    return [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]]


BEHIND = {
    "silence": [],
    "an empty line, then silence": [b"\r\n"],
    "empty lines for ever": [b"\r\n"] * 60,
    "half of the next head": [HEAD],
}


@pytest.mark.parametrize("fault", BEHIND)
def test_what_comes_behind_an_answer_does_not_hold_the_connection(server: Server, fault: str) -> None:
    good = HEAD + b"content-length: %d\r\n\r\n" % len(GOOD) + GOOD
    with server.loses_nothing():
        told = tell(server.port, good, *BEHIND[fault], pause=0.1)
        assert statuses(told.answer)[0] == 200 and told.seconds < 10 * SECONDS
        assert statuses(told.answer)[1:] in ([], [408])


def test_a_body_that_goes_on_behind_its_refusal_does_not_hold_the_connection(tiny_run: Any, tmp_path: Path) -> None:
    """Whoever has no key is refused before anything of the body is looked at."""
    access = tmp_path / "access.json"
    access.write_text(json.dumps({"keys": [{"name": "web", "sha256": hashlib.sha256(b"secret").hexdigest(), "scopes": ["recommend"]}]}))
    source = RegistrySource("models:/recsys@champion", Location.under(tiny_run.home))
    with served(source, bounds={"head_seconds": str(SECONDS)}, access=access) as server:
        told = tell(server.port, HEAD + b"content-length: 100000\r\n\r\n", *[b"x"] * 60, pause=0.1)
        assert statuses(told.answer)[0] == 401 and told.seconds < 10 * SECONDS
        wait_until(lambda: not server.uvicorn.server_state.connections, 10)


def test_an_answer_that_is_never_read_does_not_hold_the_connection(server: Server) -> None:
    """Whole requests, so that no head is waited for, whose answers are more than the buffers on the way hold."""
    asked = b"GET /openapi.json HTTP/1.1\r\nhost: test\r\n\r\n"
    size = len(server.get("/openapi.json").content)
    with server.loses_nothing(), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(asked * (20_000_000 // size))
        wait_until(lambda: len(server.uvicorn.server_state.connections) == 1, 10)
        wait_until(lambda: not server.uvicorn.server_state.connections, 30)


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "in chunks"])
def test_a_gigabyte_is_refused_before_it_is_read(server: Server, chunked: bool) -> None:
    memory = psutil.Process().memory_info
    block = b"x" * (1 << 16)
    head = HEAD + (b"transfer-encoding: chunked\r\n\r\n" if chunked else b"content-length: %d\r\n\r\n" % GIGABYTE)
    chunk = b"%x\r\n" % len(block) + block + b"\r\n" if chunked else block
    with server.loses_nothing():
        before = memory().rss
        for _ in range(3):
            told, sent = pour(server.port, head, repeat(chunk, GIGABYTE // len(chunk)))
            told.is_refusal(413)
            assert sent < 0.05 * GIGABYTE and told.seconds < 10
        assert memory().rss - before < 30e6


def test_a_body_that_lies_about_its_length_is_refused_or_waited_for(server: Server) -> None:
    with server.loses_nothing():
        short = tell(server.port, HEAD + b"connection: close\r\ncontent-length: 5\r\n\r\n" + GOOD)
        assert statuses(short.answer) == [400]
        tell(server.port, HEAD + b"content-length: %d\r\n\r\n" % (len(GOOD) + 5) + GOOD).is_refusal(408)


PARTS = {
    "before anything": b"",
    "in the middle of a head": HEAD,
    "in the middle of a body": HEAD + b"content-length: 900\r\n\r\n{",
    "in the middle of a chunk": HEAD + b"transfer-encoding: chunked\r\n\r\nfff\r\nabc",
    "before the answer": HEAD + b"content-length: %d\r\n\r\n" % len(GOOD) + GOOD,
    "before the second answer": 2 * (HEAD + b"content-length: %d\r\n\r\n" % len(GOOD) + GOOD),
    "before the similar items": post(b'{"item_id": "1"}', "/v1/similar"),
    "before many lists": post(json.dumps({"inputs": [{"user_id": str(n)} for n in range(50)]}).encode(), "/invocations"),
}


@pytest.mark.parametrize("reset", [False, True], ids=["orderly", "by a reset"])
@pytest.mark.parametrize("part", PARTS)
def test_a_client_that_goes_is_forgotten(server: Server, part: str, reset: bool) -> None:
    with server.loses_nothing(), ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(lambda n: leave(server.port, PARTS[part], 0.002 * (n % 5), reset=reset), range(3 * TOGETHER)))


def test_others_are_answered_in_full_while_clients_go_and_drip(server: Server) -> None:
    """A hundred dripping connections and ninety that go, beside requests that are all answered."""
    with server.loses_nothing(), ThreadPoolExecutor(120) as pool:
        drips = [pool.submit(tell, server.port, *DRIP[:30], pause=0.05) for _ in range(100)]
        gone = [pool.submit(leave, server.port, part, 0.01, reset=True) for part in PARTS.values() for _ in range(11)]
        for _ in range(20):
            assert server.is_whole()
        assert all(drip.result().status == 408 for drip in drips) and all(each.result() is None for each in gone)


def test_who_has_gone_is_counted_as_gone(server: Server) -> None:
    before = server.count("recsys_rejected_total", reason="cancelled")
    for _ in range(5):
        leave(server.port, PARTS["in the middle of a body"], 0.01, reset=False)
    wait_until(lambda: server.count("recsys_rejected_total", reason="cancelled") == before + 5, 10)
    assert server.count("recsys_requests_total", status="500") == 0
