# SPDX-License-Identifier: Apache-2.0
"""The API over a real bundle: answers, probes, metrics, and every way of asking wrongly."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from feature_store.online import FeatureStoreError
from recsys.core.errors import BundleError
from recsys.inference.request import Request
from recsys.registry import Location
from serving.app import create_app
from serving.engine import Engine, Loaded, RegistrySource
from serving.engine.pace import Pace
from serving.schemas import ListOut
from tests.serving.support import Faulty, Switch, running, settings, wait_until

Load = Callable[..., Loaded]


@pytest.fixture(scope="module")
def engine(tiny_run) -> Engine:
    return Engine(RegistrySource("models:/recsys@champion", Location.under(tiny_run.home)), settings())


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine, engine.settings)) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client


def served(source: Any, **changed: Any) -> tuple[Engine, TestClient]:
    engine = Engine(source, settings(**changed))
    return engine, TestClient(create_app(engine, engine.settings), raise_server_exceptions=False)


def value(client: TestClient, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [s for family in families for s in family.samples if s.name == name and labels.items() <= s.labels.items()]
    return sum(sample.value for sample in samples)


def test_a_served_list_is_the_recommenders(client: TestClient, engine: Engine) -> None:
    answer = client.post("/v1/recommend", json={"user_id": "3", "k": 4}).json()
    (expected,) = engine.loaded.recommender.recommend([Request(user_id="3", k=4, at=datetime.now(UTC))])
    assert [item["item_id"] for item in answer["items"]] == [item.item_id for item in expected.items]
    assert [item["score"] for item in answer["items"]] == pytest.approx([item.score for item in expected.items], abs=1e-3)
    assert all("No." in item["title"] for item in answer["items"])
    assert any(reason["title"] for item in answer["items"] for reason in item["reasons"])
    assert answer["flags"] == []


def test_an_answer_says_what_made_it(client: TestClient, engine: Engine) -> None:
    response = client.post("/v1/recommend", json={"user_id": "17"}, headers={"x-request-id": "mine-1"})
    answer, loaded = response.json(), engine.loaded
    assert answer["request_id"] == response.headers["x-request-id"] == "mine-1"
    assert answer["model"] == {"name": "recsys", "version": 1, "sha256": loaded.sha256, "features": loaded.features}
    assert set(answer["stages_ms"]) == {"queue", "features", "retrieve", "items", "rank", "respond", "explain"}
    assert sum(answer["stages_ms"].values()) <= answer["took_ms"]
    assert answer["features"]["cached"] is False and answer["features"]["cached_age_seconds"] is None
    assert answer["features"]["newest_event_age_seconds"] > 86400
    new = client.post("/v1/recommend", json={"user_id": "who?"}, headers={"x-request-id": "not\tprintable"}).json()
    assert new["features"]["newest_event_age_seconds"] is None and len(new["request_id"]) == 32


@pytest.mark.parametrize("path", ["recommend", "rank"])
@pytest.mark.parametrize("explain", [True, False])
def test_an_answer_is_what_the_schema_says_field_by_field(client: TestClient, path: str, explain: bool) -> None:
    asked = {"user_id": "17", "explain": explain} | ({"item_ids": ["1", "2", "3"]} if path == "rank" else {})
    text = client.post(f"/v1/{path}", json=asked).text
    assert json.loads(ListOut.model_validate_json(text, strict=True).model_dump_json()) == json.loads(text)


def test_an_unknown_user_is_a_new_one(client: TestClient) -> None:
    answer = client.post("/v1/recommend", json={"user_id": "who?", "k": 3})
    assert answer.status_code == 200
    assert answer.json()["flags"] == ["new_user"]
    assert len(answer.json()["items"]) == 3


def test_k_above_the_catalogue_gives_what_there_is(client: TestClient) -> None:
    answer = client.post("/v1/recommend", json={"user_id": "3", "k": 1000, "explain": False}).json()
    assert answer["flags"] == ["short_list"]
    assert 0 < len(answer["items"]) < 100


def test_rank_orders_what_it_is_given(client: TestClient) -> None:
    answer = client.post("/v1/rank", json={"user_id": "3", "item_ids": ["5", "50", "99"]}).json()
    assert sorted(item["item_id"] for item in answer["items"]) == ["5", "50", "99"]
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/recommend", "{not json", 400, "body: not valid JSON"),
        ("/v1/recommend", "[]", 422, "body: "),
        ("/v1/recommend", "{}", 422, "user_id: Field required"),
        ("/v1/recommend", '{"user_id": "1", "k": 0}', 422, "k: Input should be greater than or equal to 1, got 0"),
        ("/v1/recommend", '{"user_id": "1", "k": 100000}', 422, "k: Input should be less than or equal to 1000"),
        ("/v1/recommend", '{"user_id": 1}', 422, "user_id: Input should be a valid string, got 1"),
        ("/v1/recommend", '{"user_id": ""}', 422, "user_id: "),
        ("/v1/recommend", '{"user_id": "1", "kk": 3}', 422, "kk: Extra inputs are not permitted"),
        ("/v1/recommend", '{"user_id": "1", "deadline_ms": 0}', 422, "deadline_ms: "),
        ("/v1/recommend", '{"user_id": "1", "deadline_ms": NaN}', 400, "body: not valid JSON: NaN is no number of JSON"),
        ("/v1/recommend", '{"user_id": "1", "deadline_ms": 1e400}', 422, "deadline_ms: "),
        ("/v1/recommend", '{"user_id": "1", "user_id": "2"}', 400, "body: not valid JSON: the key 'user_id' stands there twice"),
        ("/v1/rank", '{"user_id": "1", "item_ids": []}', 422, "item_ids: "),
        ("/v1/rank", '{"user_id": "1", "item_ids": ["nope"]}', 422, "item_ids: 'nope' is not in the catalogue"),
        ("/v2/recommend", "{}", 404, "Not Found"),
    ],
)
def test_wrong_requests_get_a_sentence(client: TestClient, path: str, body: str, status: int, message: str) -> None:
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"] == "invalid_input"
    assert answer.json()["message"].startswith(message)


@pytest.mark.parametrize("header", ["soon", "-1", "0", "nan", "inf", ""])
def test_a_deadline_that_is_none_is_refused(client: TestClient, header: str) -> None:
    answer = client.post("/v1/recommend", json={"user_id": "1"}, headers={"x-deadline-ms": header})
    assert answer.status_code == 422 and answer.json()["message"].startswith("x-deadline-ms: expected a positive number")


def test_metrics_can_be_scraped_and_reasons_add_up(client: TestClient) -> None:
    def rejected() -> float:
        return value(client, "recsys_rejected_total")

    def failed() -> float:
        families = text_string_to_metric_families(client.get("/metrics").text)
        samples = [s for family in families for s in family.samples if s.name == "recsys_requests_total"]
        return sum(s.value for s in samples if s.labels["status"] != "200" and s.labels["route"] != "/readyz")

    before = rejected()
    answered = value(client, "recsys_requests_total", route="/v1/recommend", status="200")
    client.post("/v1/recommend", json={"user_id": "3", "k": 0})
    client.post("/v1/recommend", json={"user_id": "3", "k": 1})
    assert rejected() == before + 1 == value(client, "recsys_rejected_total", reason="invalid_input") == failed()
    assert value(client, "recsys_requests_total", route="/v1/recommend", status="200") == answered + 1
    assert value(client, "recsys_model_info", version="1") == 1
    assert value(client, "recsys_stage_seconds_count", stage="rank") >= 1
    assert value(client, "recsys_queue_rows") == value(client, "recsys_requests_waiting") == 0


def test_a_full_queue_says_when_to_come_back_and_a_deadline_that_passed_says_so(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, release = load(), threading.Event()
    retrieve = loaded.recommender.retrieve
    engine, client = served(Switch(v1=lambda: loaded), queue_rows=20, max_batch_rows=20)
    body = {"user_id": "1", "explain": False}
    with client:
        wait_until(lambda: engine.loaded is not None)
        monkeypatch.setattr(loaded.recommender, "retrieve", lambda *arguments: release.wait(30) and retrieve(*arguments))
        codes: list[int] = []

        def ask(user: str = "1") -> None:
            codes.append(client.post("/v1/recommend", json={**body, "user_id": user}).status_code)

        running_ = threading.Thread(target=ask)
        running_.start()
        wait_until(lambda: value(client, "recsys_batch_rows_count") == 1)
        waiting = threading.Thread(target=ask)
        waiting.start()
        wait_until(lambda: value(client, "recsys_queue_rows") == 20)
        full = client.post("/v1/recommend", json=body)
        assert (full.status_code, full.json()["error"]) == (429, "queue_full")
        assert int(full.headers["retry-after"]) >= 1
        release.set()
        running_.join(30)
        waiting.join(30)
        assert codes == [200, 200]
        release.clear()
        blocked = threading.Thread(target=ask, args=["9"])
        blocked.start()
        wait_until(lambda: value(client, "recsys_batch_rows_count") == 3)
        engine._queue.pace = Pace()  # which has learned how long a blocked batch takes, and would reject the next at once
        late = client.post("/v1/recommend", json=body, headers={"x-deadline-ms": "200"})
        assert (late.status_code, late.json()["error"]) == (504, "deadline_before_start")
        release.set()
        blocked.join(30)


def test_the_smaller_of_two_deadlines_counts_and_none_is_above_the_largest(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, client = served(Switch(v1=load), largest_deadline_ms=5_000)
    budgets: list[float] = []

    async def answer(work: Any) -> Any:
        budgets.append(work.deadline.remaining())
        return await Engine.answer(engine, work)

    monkeypatch.setattr(engine, "answer", answer)
    with client:
        wait_until(lambda: engine.loaded is not None)
        for body, header in ((3000, "4000"), (4000, "3000"), (None, "2000"), (60_000, None), (None, None)):
            headers = {} if header is None else {"x-deadline-ms": header}
            assert client.post("/v1/recommend", json={"user_id": "1", "deadline_ms": body}, headers=headers).status_code == 200
    assert budgets == pytest.approx([3, 3, 2, 5, 5], abs=0.5)


def test_a_failure_inside_is_told_without_details(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, client = served(Switch(v1=load))
    with client:
        wait_until(lambda: engine.loaded is not None)
        monkeypatch.setattr("serving.engine.engine.Batch.run", lambda _: 1 / 0)
        broken = client.post("/v1/recommend", json={"user_id": "1"})
        assert (broken.status_code, broken.json()) == (500, {"error": "internal", "message": "the server failed; its log says why"})
        assert value(client, "recsys_requests_total", route="/v1/recommend", status="500") == 1


def test_a_client_that_goes_is_counted_and_its_request_taken_back(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a real ASGI connection: the client disconnects while its request waits."""
    with running(Switch(v1=load), max_delay_ms=60_000) as engine:
        monkeypatch.setattr(engine, "start", lambda: None)
        app = create_app(engine, engine.settings)
        body = b'{"user_id": "1"}'
        messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
        sent: list[Any] = []

        async def receive() -> Any:
            message = messages.pop(0)
            if message["type"] == "http.disconnect":
                while engine._queue.rows == 0:
                    await asyncio.sleep(0.01)
            return message

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/recommend", "raw_path": b"/v1/recommend", "query_string": b"",
            "http_version": "1.1",
            "headers": [(b"content-type", b"application/json")], "scheme": "http", "server": ("test", 80), "client": ("test", 1),
        }  # fmt: skip
        asyncio.run(app(scope, receive, send))
        assert sent[0]["status"] == 499 and engine._queue.rows == 0
        assert engine.metrics.rejected.labels("cancelled")._value.get() == 1


PROBES = ("/livez", "/startupz", "/readyz")


def codes(client: TestClient) -> tuple[int, ...]:
    return tuple(client.get(path).status_code for path in PROBES)


def test_the_probes_under_faults(load: Load, faulty: Faulty) -> None:
    """The truth table of docs/serving.md, one line after another."""
    source = Switch()
    engine, client = served(source, breaker_failures=1)
    with client:
        assert codes(client) == (200, 503, 503), "nothing to load"
        answer = client.post("/v1/recommend", json={"user_id": "1"})
        assert (answer.status_code, answer.json()["error"]) == (503, "dependency")
        wait_until(lambda: "not in the registry" in client.get("/readyz").json()["message"])

        source.loaders[0] = lambda: load(0, reader=faulty)
        wait_until(lambda: engine.loaded is not None)
        assert codes(client) == (200, 200, 200), "loaded"
        assert client.post("/v1/recommend", json={"user_id": "1"}).status_code == 200

        def broken() -> Loaded:
            raise BundleError("a file was changed")

        source.loaders[9], source.wanted = broken, 9
        wait_until(lambda: engine.problem is not None)
        assert codes(client) == (200, 200, 200), "a swap failed"
        assert "a file was changed" in client.get("/readyz").json()["message"]
        source.wanted = 0
        wait_until(lambda: engine.problem is None)

        faulty.error = FeatureStoreError("gone")
        assert client.post("/v1/recommend", json={"user_id": "1"}).status_code == 200
        assert codes(client) == (200, 200, 503), "the store is gone"
        assert client.get("/readyz").json()["store"] == "left alone"
        faulty.heal()
        wait_until(lambda: codes(client) == (200, 200, 200))

        engine.drain()
        assert codes(client) == (200, 200, 503), "about to end"
        assert client.post("/v1/recommend", json={"user_id": "1"}).status_code == 200
        engine.draining = False

        engine._stopped = True
        with engine._changed:
            engine._changed.notify()
        wait_until(lambda: not engine.alive)
        assert codes(client) == (503, 200, 503), "the thread that computes has ended"


def test_a_server_that_is_told_to_do_without_the_store_stays_ready(load: Load, faulty: Faulty) -> None:
    engine, client = served(Switch(v1=lambda: load(reader=faulty)), breaker_failures=1, ready_needs_store=False)
    with client:
        wait_until(lambda: engine.loaded is not None)
        faulty.error = FeatureStoreError("gone")
        assert client.post("/v1/recommend", json={"user_id": "1"}).json()["flags"] == ["popular", "no_reasons"]
        assert client.get("/readyz").status_code == 200 and client.get("/readyz").json()["store"] == "left alone"
