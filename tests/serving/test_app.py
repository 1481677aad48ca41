# SPDX-License-Identifier: Apache-2.0
"""The API over a real bundle: answers, probes, metrics, and every way of asking wrongly."""

import threading
import time
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from recsys.core.errors import RegistryError
from recsys.inference.request import Request
from recsys.registry import Location
from serving.app import create_app
from serving.engine import Engine, load


@pytest.fixture(scope="module")
def engine(tiny_run) -> Engine:
    location = Location.under(tiny_run.home)
    return Engine(lambda: load("models:/recsys@champion", location))


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine)) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client


def wait_until(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "not ready in time"
        time.sleep(0.05)


def test_a_served_list_is_the_recommenders(client: TestClient, engine: Engine) -> None:
    answer = client.post("/v1/recommend", json={"user_id": "3", "k": 4}).json()
    recommender = engine.loaded.recommender
    from datetime import UTC, datetime

    (expected,) = recommender.recommend([Request(user_id="3", k=4, at=datetime.now(UTC))])
    assert [item["item_id"] for item in answer["items"]] == [item.item_id for item in expected.items]
    assert [item["score"] for item in answer["items"]] == pytest.approx([item.score for item in expected.items], abs=1e-3)
    assert all("No." in item["title"] for item in answer["items"])
    assert any(reason["title"] for item in answer["items"] for reason in item["reasons"])
    assert answer["model"]["version"] == 1
    assert answer["flags"] == []


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


def test_metrics_can_be_scraped_and_add_up(client: TestClient) -> None:
    def value(name: str, **labels: str) -> float:
        families = text_string_to_metric_families(client.get("/metrics").text)
        samples = [s for family in families for s in family.samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(sample.value for sample in samples)

    rejected, answered = value("recsys_rejected_total"), value("recsys_requests_total", route="/v1/recommend", status="200")
    client.post("/v1/recommend", json={"user_id": "3", "k": 0})
    client.post("/v1/recommend", json={"user_id": "3", "k": 1})
    assert value("recsys_rejected_total") == rejected + 1
    assert value("recsys_rejected_total", reason="invalid_input") == rejected + 1
    assert value("recsys_requests_total", route="/v1/recommend", status="200") == answered + 1
    assert value("recsys_model_info", version="1") == 1


def test_without_a_model_the_server_lives_but_is_not_ready_and_loads_it_when_it_comes(engine: Engine) -> None:
    attempts = []

    def loader():
        attempts.append(1)
        if len(attempts) < 3:
            raise RegistryError("models:/recsys@champion: not in the registry")
        return engine.loaded

    late = Engine(loader, retry_seconds=0.2)
    with TestClient(create_app(late)) as client:
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 503
        answer = client.post("/v1/recommend", json={"user_id": "1"})
        assert (answer.status_code, answer.json()["error"]) == (503, "dependency")
        assert "not in the registry" in answer.json()["message"]
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/v1/recommend", json={"user_id": "1", "explain": False}).status_code == 200


def test_a_full_queue_and_a_failure_inside(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Engine(lambda: engine.loaded, max_waiting=1)
    release = threading.Event()
    with TestClient(create_app(narrow), raise_server_exceptions=False) as client:
        wait_until(lambda: narrow.loaded is not None)
        narrow._executor.submit(release.wait, 30)
        codes: list[int] = []
        body = {"user_id": "1", "explain": False}
        first = threading.Thread(target=lambda: codes.append(client.post("/v1/recommend", json=body).status_code))
        first.start()
        wait_until(lambda: narrow.waiting == 1)
        full = client.post("/v1/recommend", json=body)
        assert (full.status_code, full.json()["error"]) == (429, "queue_full")
        release.set()
        first.join(30)
        assert codes == [200]

        def fail(*_):
            raise ZeroDivisionError

        monkeypatch.setattr(type(engine.loaded.recommender), "recommend", fail)
        broken = client.post("/v1/recommend", json=body)
        assert (broken.status_code, broken.json()["error"]) == (500, "internal")
