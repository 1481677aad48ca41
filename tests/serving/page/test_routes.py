# SPDX-License-Identifier: Apache-2.0
"""What the page is made of and what it asks for: answers, bounds, headers, and every way of asking wrongly."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from feature_store.online import FeatureStoreError
from serving.app import create_app
from serving.engine import Engine, Loaded
from serving.page.files import page_files
from serving.page.report import plots_of
from tests.serving.page.conftest import MARKUP
from tests.serving.support import Faulty, Switch, settings, wait_until


def client_of(source: Switch) -> TestClient:
    engine = Engine(source, settings())
    return TestClient(create_app(engine, engine.settings), raise_server_exceptions=False)


@pytest.fixture
def client(named: Callable[..., Loaded]) -> Iterator[TestClient]:
    with client_of(Switch(v1=lambda: named(1))) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client


def test_the_page_holds_a_browser_to_its_own_files() -> None:
    with client_of(Switch()) as client:
        for address in ("/", *(f"/page/static/{name}" for name in page_files())):
            answer = client.get(address)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"


def test_no_script_or_style_stands_in_the_markup_and_nothing_is_elsewhere() -> None:
    files = {name: file.content.decode() for name, file in page_files().items()}
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", files["index.html"]) == []
    for name, text in files.items():
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == [], name
        assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text) == [], name
        used = re.findall(r'"(?:/page/static/|\./)([\w.]+)"', text)
        assert set(used) <= files.keys(), name


@pytest.mark.parametrize("name", ["nothing.js", "..%2f..%2fsettings.py", "%2e%2e/what_if.py", "..%5cfiles.py"])
def test_no_other_file_can_be_had(name: str) -> None:
    with client_of(Switch()) as client:
        answer = client.get(f"/page/static/{name}")
        assert answer.status_code == 404 and answer.json()["error"] == "invalid_input"


def test_before_a_model_is_loaded_the_page_is_there_and_lists_are_not() -> None:
    with client_of(Switch()) as client:
        assert client.get("/page/bundles").json() == {"bundles": []}
        for answer in (client.post("/page/what-if", json={}), client.get("/page/items"), client.get("/page/report")):
            assert answer.status_code == 503 and answer.json()["error"] == "dependency"


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("k", {"k": 51}),
        ("k", {"k": 0}),
        ("history", {"history": ["1"] * 257}),
        ("history.0", {"history": ["x" * 257]}),
        ("history.0", {"history": [""]}),
        ("history.0", {"history": [{"item_id": "1"}]}),
        ("user_id", {"user_id": "x" * 257}),
        ("version", {"version": 2}),
        ("version", {"version": -1}),
        ("titles", {"titles": ["Horror No. 7"]}),
        ("history", {"history": ["no such"]}),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(client: TestClient, field: str, body: dict[str, Any]) -> None:
    answer = client.post("/page/what-if", json=body)
    assert answer.status_code == 422
    assert answer.json()["error"] == "invalid_input" and answer.json()["message"].startswith(f"{field}: ")


def test_searches_are_bounded(client: TestClient) -> None:
    for address in ("/page/items?q=" + "x" * 101, "/page/users?q=" + "x" * 101, "/page/items?limit=21", "/page/users?limit=0"):
        assert client.get(address).status_code == 422


def test_titles_are_found_by_any_part_whatever_the_case(client: TestClient) -> None:
    found = client.get("/page/items", params={"q": "hORROR", "limit": 5}).json()["items"]
    assert len(found) == 5 and all(item["title"].startswith("Horror") for item in found)
    (exact,) = client.get("/page/items", params={"q": "no. 52"}).json()["items"]
    assert exact["item_id"] == "52"
    assert client.get("/page/items", params={"q": "no such title"}).json() == {"items": []}
    (markup,) = client.get("/page/items", params={"q": "<script>"}).json()["items"]
    assert markup == {"item_id": "7", "title": MARKUP}


def test_users_are_found_by_id_and_new_ones_are_said_to_be_new(client: TestClient) -> None:
    found = {user["user_id"]: user["events"] for user in client.get("/page/users", params={"q": "10"}).json()["users"]}
    assert found["10"] > 0
    assert client.get("/page/users", params={"q": "who?"}).json() == {"users": [{"user_id": "who?", "events": 0}]}
    some = client.get("/page/users").json()["users"]
    assert some and all(user["events"] > 0 for user in some)


def test_a_store_that_fails_is_a_dependency(load: Callable[..., Loaded], faulty: Faulty) -> None:
    with client_of(Switch(v1=lambda: load(1, reader=faulty))) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        faulty.error = FeatureStoreError("gone")
        for answer in (client.post("/page/what-if", json={"user_id": "10"}), client.get("/page/users?q=10")):
            assert answer.status_code == 503 and answer.json()["error"] == "dependency"


def test_the_page_waits_in_a_line_of_bounded_length(load: Callable[..., Loaded], faulty: Faulty) -> None:
    with client_of(Switch(v1=lambda: load(1, reader=faulty))) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        faulty.delay = 1.0
        with ThreadPoolExecutor(24) as pool:
            asked = [pool.submit(client.get, "/page/users?q=10", headers={"x-deadline-ms": "500"}) for _ in range(24)]
            statuses = Counter(answer.result().status_code for answer in asked)
    assert statuses.keys() == {200, 429, 504}
    assert statuses[429] == 24 - 16


def test_the_report_shows_what_was_measured(client: TestClient, bundle) -> None:
    plots = {plot["title"]: plot["bars"] for plot in client.get("/page/report").json()["plots"]}
    (final,) = (bar for bar in plots["The final list: NDCG@10"] if bar["name"] == "final")
    assert final["value"] == bundle.metrics["list"]["final"]["ndcg@10"] and final["low"] is None
    intervals = plots["Differences with their 95% intervals"]
    assert len(intervals) == len(bundle.metrics["intervals"])
    assert all(bar["low"] <= bar["value"] <= bar["high"] for bar in intervals)


def test_a_figure_that_is_not_there_is_not_drawn() -> None:
    assert plots_of({}) == []
    (plot,) = plots_of({"ranking": {"a": {"auc": 0.5}, "b": {"auc": None}, "c": {"auc": float("nan")}, "d": {}}})
    assert [bar.name for bar in plot.bars] == ["a"]
