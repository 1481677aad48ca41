# SPDX-License-Identifier: Apache-2.0
"""Events that come to the server: what they change, that they count once however they come, and what is refused."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from feature_store.definitions import FeatureRepo
from feature_store.materialize import append
from feature_store.online import OnlineReader, OnlineStore, SQLiteStore
from recsys.bundle.bundle import Bundle
from recsys.core.config import parse
from recsys.core.schema import REQUEST_TIME, TIME
from recsys.inference.request import InvalidRequest
from recsys.registry import Location
from serving.app import create_app
from serving.engine import Engine, Hosting, Loaded, RegistrySource
from serving.events import Event, EventViews, Held, HeldEvents, StoredEvents
from serving.overlaid import OverlaidStore
from tests.serving.support import Switch, settings, wait_until

MOMENT = datetime.now(UTC).replace(microsecond=7) - timedelta(minutes=5)


@pytest.fixture(scope="module")
def repo(bundle: Bundle) -> FeatureRepo:
    return parse(FeatureRepo, bundle.features, source="features.json")


@pytest.fixture
def store(bundle: Bundle, tiny_run: Any, tmp_path: Path) -> SQLiteStore:
    """A copy of the real store, which may be written to."""
    path = tmp_path / "store.sqlite"
    original = Location.under(tiny_run.home).online_store(bundle.manifest.feature_versions)
    for file in original.parent.glob(original.name + "*"):
        shutil.copy(file, path.with_name(file.name.replace(original.name, path.name)))
    return SQLiteStore(SQLiteStore.Config(path=path))


def event(name: str = "e1", item: str = "5", **changed: Any) -> Event:
    return replace(Event(name, "3", item, MOMENT, values={"rating": 5.0}), **changed)


def table(*events: Event, seq: int) -> pa.Table:
    """Events as the batch road has them."""
    rows = [(e.user_id, e.item_id, e.time, e.time, seq + n, e.values["rating"]) for n, e in enumerate(events)]
    names = ["user_id", "item_id", "event_time", "available_time", "ingest_seq", "rating"]
    kinds = [pa.string(), pa.string(), TIME, TIME, pa.int64(), pa.float64()]
    return pa.table([pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)], names=names)


def features(repo: FeatureRepo, store: OnlineStore, service: str, key: str) -> dict[str, Any]:
    entity = repo.entity(service)
    spine = pa.table({entity: [key], REQUEST_TIME: pa.array([datetime.now(UTC) + timedelta(days=1)], TIME)})
    return OnlineReader(repo, store).read(service, spine).to_pylist()[0]


def all_features(repo: FeatureRepo, store: OnlineStore) -> list[dict[str, Any]]:
    found = [features(repo, store, service, key) for service, key in (("user", "3"), ("seen", "3"), ("item", "5"), ("item", "6"))]
    return [{name: value for name, value in row.items() if name != REQUEST_TIME and "idle" not in name} for row in found]


def test_held_events_are_features_as_if_they_had_been_written(repo: FeatureRepo, store: SQLiteStore) -> None:
    """Against the batch road's own way of adding events."""
    held, views = Held(10), EventViews(repo)
    before = all_features(repo, store)
    for one in (event(), event("e2", "6", time=MOMENT + timedelta(seconds=1))):
        assert HeldEvents(views, held).add(one) and not HeldEvents(views, held).add(one)
    shown = all_features(repo, OverlaidStore(store, views, held))
    assert shown != before and shown[0]["history_item"][-2:] == ["5", "6"]
    append(repo, views.source, table(event(), event("e2", "6", time=MOMENT + timedelta(seconds=1)), seq=10**9), store)
    assert all_features(repo, store) == shown
    assert all_features(repo, OverlaidStore(store, views, held)) == shown, "what came by the batch road counts once"


def test_an_event_that_the_batch_road_brought_first_counts_once(repo: FeatureRepo, store: SQLiteStore) -> None:
    views, held = EventViews(repo), Held(10)
    append(repo, views.source, table(event(), seq=10**9), store)
    before = all_features(repo, store)
    assert not StoredEvents(repo, store).add(event())
    HeldEvents(views, held).add(event())
    assert all_features(repo, store) == before == all_features(repo, OverlaidStore(store, views, held))


def test_a_written_event_counts_once_when_it_comes_again_on_either_road(repo: FeatureRepo, store: SQLiteStore) -> None:
    events, before = StoredEvents(repo, store), all_features(repo, store)
    assert events.add(event(ingest_seq=10**9))
    after = all_features(repo, store)
    assert after != before and after[0]["history_item"][-1] == "5"
    assert not events.add(event(ingest_seq=10**9))
    append(repo, "interactions", table(event(), seq=10**9), store)
    assert all_features(repo, store) == after


def test_the_oldest_events_give_way_and_an_id_is_of_one_event(repo: FeatureRepo) -> None:
    held = Held(2)
    assert all(held.add(event(name)) for name in ("e1", "e2", "e3"))
    assert [one.event_id for one in held.of("user_id", "3")] == ["e2", "e3"]
    with pytest.raises(InvalidRequest, match="event_id: 'e3' was given before, to another event"):
        held.add(event("e3", "6"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": {"rating": "high"}}, "values: rating: expected double, got 'high'"),
        ({"values": {"ratings": 5}}, "values: unknown column 'ratings'; did you mean 'rating'"),
        ({"values": {"rating": 10**400}}, "values: rating: expected double"),
        ({"values": {"item_id": "7"}}, "values: unknown column 'item_id'"),
    ],
)
def test_values_that_no_feature_reads_are_refused(repo: FeatureRepo, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        EventViews(repo).check(event(**changed))


@contextmanager
def serving(source: Any, **changed: Any) -> Iterator[TestClient]:
    engine = Engine(source, settings(**changed))
    with TestClient(create_app(engine, engine.settings)) as client:
        wait_until(lambda: engine.loaded is not None)
        yield client


BODY = {"event_id": "a", "user_id": "a new one", "item_id": "5", "time": MOMENT.isoformat(), "values": {"rating": 5}}


def test_an_event_changes_the_next_answer(tiny_run: Any) -> None:
    source = RegistrySource("models:/recsys@champion", Location.under(tiny_run.home), Hosting(events="held"))
    with serving(source) as client:
        ask = {"user_id": "a new one", "k": 5}
        before = client.post("/v1/recommend", json=ask).json()
        first = before["items"][0]["item_id"]
        body = {**BODY, "item_id": first}
        assert client.post("/v1/events", json=body).json() == {"event_id": "a", "status": "accepted", "known_item": True}
        after = client.post("/v1/recommend", json=ask).json()
        assert before["flags"] == ["new_user"] and after["flags"] == []
        assert first not in [item["item_id"] for item in after["items"]] and after["features"]["newest_event_age_seconds"] < 3600
        assert client.post("/v1/events", json=body).json()["status"] == "duplicate"
        unknown = client.post("/v1/events", json={**BODY, "event_id": "b", "item_id": "none such"}).json()
        assert unknown == {"event_id": "b", "status": "accepted", "known_item": False}
        assert "recsys_events_unknown_items_total 1.0" in client.get("/metrics").text
        late = {**BODY, "event_id": "c", "time": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}
        for wrong in (late, {**BODY, "event_id": "d", "time": "2020-01-01T00:00:00"}, {**body, "item_id": "6"}):
            answer = client.post("/v1/events", json=wrong)
            assert (answer.status_code, answer.json()["error"]) == (422, "invalid_input")


def test_a_server_that_takes_no_events_says_so(bundle: Bundle, online: Any) -> None:
    with serving(Switch(v1=lambda: Loaded.of(bundle, online, name="recsys", version=1))) as client:
        answer = client.post("/v1/events", json=BODY)
        assert (answer.status_code, answer.json()["error"]) == (503, "dependency")


def test_workers_do_not_hold_events_that_others_would_not_see() -> None:
    assert (settings().events_go, settings(workers=2).events_go, settings(workers=2, events="store").events_go) == ("held", "off", "store")
