# SPDX-License-Identifier: Apache-2.0
"""Whatever comes, no route fails, and every refusal has the fixed form; and what the documentation shows is answered.

Bodies are the documented examples with hostile values in any place, JSON that means nothing, and bytes that are none.
"""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as generated
from hypothesis import strategies as st

from recsys.core.deadline import RejectReason
from recsys.registry import Location
from serving.app import create_app
from serving.engine import Engine, Hosting, RegistrySource
from tests.serving.support import settings, wait_until


@pytest.fixture(scope="module")
def client(tiny_run: Any) -> Iterator[TestClient]:
    source = RegistrySource("models:/recsys@champion", Location.under(tiny_run.home), Hosting(events="held", held_events=50))
    engine = Engine(source, settings(max_delay_ms=0))
    with TestClient(create_app(engine, engine.settings), raise_server_exceptions=False) as client:
        wait_until(lambda: engine.loaded is not None)
        yield client


def resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return schema if reference is None else document["components"]["schemas"][reference.rpartition("/")[2]]


def examples(document: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Method, path and body of everything that is documented."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            filled = path
            for parameter in operation.get("parameters", ()):
                assert parameter["in"] == "path" and parameter["schema"]["examples"], f"{path}: {parameter['name']} has no example"
                filled = filled.replace(f"{{{parameter['name']}}}", parameter["schema"]["examples"][0])
            if method == "get":
                yield method, filled, None
                continue
            body = resolved(operation["requestBody"]["content"]["application/json"]["schema"], document)
            assert body.get("examples"), f"{path}: the body has no example"
            for example in body["examples"]:
                yield method, filled, example


def test_what_is_documented_is_answered(client: TestClient) -> None:
    shown = list(examples(client.get("/openapi.json").json()))
    assert {"/v1/recommend", "/v1/similar", "/v1/events", "/v1/rank", "/invocations", "/v2/models/recsys/infer", "/metrics"} <= {
        path for _, path, _ in shown
    }
    for method, path, body in shown:
        answer = client.request(method, path, json=body) if body is not None else client.request(method, path)
        assert answer.status_code == 200, (path, answer.text)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -0.0, float("nan"), float("inf"), float("-inf")]),
    st.floats(),
    st.text(st.characters(), max_size=20),
    st.sampled_from(
        ["\ud800", "\udfff\ud800", "\x00", "1" * 300, "../../etc/passwd", "file:///etc/passwd", "9999-12-31T23:59:59-23:59", "NaN"]
    ),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12
)
DEEP = st.integers(1, 60).map(lambda depth: json.loads("[" * depth + "]" * depth))


def places(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [before, *(place for key, each in inner for place in places(each, (*before, key)))]


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    copy = value.copy()
    copy[place[0]] = changed(copy[place[0]], place[1:], new)
    return copy


@st.composite
def bodies(draw: st.DrawFn, shown: list[Any]) -> bytes:
    body = draw(st.sampled_from(shown))
    for _ in range(draw(st.integers(1, 2))):
        body = changed(body, draw(st.sampled_from(places(body))), draw(JSON | DEEP))
    text = json.dumps(body, ensure_ascii=draw(st.booleans()))
    if draw(st.integers(0, 9)) == 0 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]  # every key twice
    content = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=8)) + content[at:]
    return content


HEADERS = st.fixed_dictionaries(
    {"content-type": st.sampled_from(["application/json"] * 8 + ["text/plain", "application/octet-stream", ""])},
    optional={
        "x-deadline-ms": st.sampled_from(["1e9", "5000", "-1", "nan", "soon"]),
        "x-request-id": st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=200),
        "inference-header-content-length": st.sampled_from(["0", "2", "-5", "99999999999", "two", "1_0"]),
    },
)
POSTED = (
    "/v1/recommend",
    "/v1/rank",
    "/v1/similar",
    "/v1/events",
    "/invocations",
    "/v2/models/recsys/infer",
    "/v2/models/recsys/versions/1/infer",
)
LATE = {RejectReason.DEADLINE_BEFORE_START, RejectReason.DEADLINE_IN_STAGE}


def hold(answer: Any, *, late: bool = True) -> None:
    """An answer, or a refusal in the fixed form that is nobody's failure; a deadline that was asked for may pass."""
    if answer.status_code == 200:
        return
    body = answer.json()
    assert set(body) == {"error", "message"} and body["error"] in set(RejectReason) and body["message"], answer.text
    in_time = answer.status_code < 500
    assert in_time or (late and answer.status_code == 504 and body["error"] in LATE), (answer.status_code, answer.text)


def fuzz(client: TestClient, path: str, count: int) -> None:
    shown = [body for _, own, body in examples(client.get("/openapi.json").json()) if own == path]
    assert shown
    seen: set[int] = set()

    @generated(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(bodies(shown), HEADERS)
    def each(content: bytes, headers: dict[str, str]) -> None:
        answer = client.post(path, content=content, headers=headers)
        seen.add(answer.status_code)
        hold(answer)

    each()
    assert seen & {400, 422}, "else nothing hostile came"


@pytest.mark.parametrize("path", POSTED)
def test_nothing_that_is_posted_fails_a_route(client: TestClient, path: str) -> None:
    fuzz(client, path, 60)


@pytest.mark.slow
@pytest.mark.parametrize("path", POSTED)
def test_nothing_that_is_posted_fails_a_route_for_long(client: TestClient, path: str) -> None:
    fuzz(client, path, 10_000)


def test_no_address_fails(client: TestClient) -> None:
    segment = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
        ["..", "v1", "v2", "models", "recsys", "versions", "1"]
    )

    @generated(max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH"]), st.lists(segment, max_size=6), st.booleans())
    def each(method: str, segments: list[str], known: bool) -> None:
        path = "/".join(["", *(["v2", "models"] if known else []), *(quote(part, safe="") for part in segments)])
        hold(client.request(method, "http://testserver" + path, follow_redirects=False))

    each()
