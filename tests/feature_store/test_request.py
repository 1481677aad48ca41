# SPDX-License-Identifier: Apache-2.0
"""Features of the request: the same offline and online, beside stored ones, versioned, never stored and never looked up."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from feature_store.definitions import FeatureRepo
from feature_store.materialize import append, materialize
from feature_store.offline import OfflineReader
from feature_store.online import MemoryStore, OnlineReader, OnlineStore, Snapshot, SQLiteStore
from recsys.core.config import parse
from recsys.core.errors import ConfigError, SchemaError
from recsys.core.status import ValueStatus

PRESENT, NULL, MISSING = int(ValueStatus.PRESENT), int(ValueStatus.NULL), int(ValueStatus.MISSING)
CONTEXT = {
    "name": "context",
    "source": "request",
    "entity": "user_id",
    "features": [
        {"kind": "attribute", "name": "request_device", "column": "device", "type": "categorical"},
        {"kind": "attribute", "name": "request_price", "column": "price", "type": "dense"},
        {"kind": "attribute", "name": "request_tags", "column": "tags", "type": "bag"},
        {"kind": "clock", "name": "request_hour", "unit": "hour"},
        {"kind": "clock", "name": "request_weekday", "unit": "weekday"},
        {"kind": "clock", "name": "request_month", "unit": "month"},
    ],
}


def _definitions(w: Any) -> dict[str, Any]:
    changed: dict[str, Any] = copy.deepcopy(w.definitions)
    changed["sources"].append({"name": "request", "kind": "request"})
    changed["views"].append(copy.deepcopy(CONTEXT))
    changed["services"] = [
        {"name": "user", "views": ["profile", "context", "activity"]},
        {"name": "item", "views": ["popularity"]},
        {"name": "only", "views": ["context"]},
    ]
    return changed


def _spine(w: Any, count: int) -> pa.Table:
    spine = w.spine("user", count)
    rows = spine.num_rows
    columns = {
        "device": pa.array([w.rng.choice(["phone", "tv", None]) for _ in range(rows)], pa.string()),
        "price": pa.array([w.rng.choice([1.5, float("nan"), None]) for _ in range(rows)], pa.float64()),
        "tags": pa.array([w.rng.choice([["a", None], [], None]) for _ in range(rows)], pa.list_(pa.string())),
    }
    for name, column in columns.items():
        spine = spine.append_column(name, column)
    return spine


def _features(read: pa.Table) -> pa.Table:
    """What was read, without the spine's own column of NaN, which equals nothing."""
    return read.drop_columns(["price"])


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> OnlineStore:
    return MemoryStore() if request.param == "memory" else SQLiteStore(SQLiteStore.Config(path=tmp_path / "s.sqlite"))


def test_values_and_statuses_come_from_the_row_alone(world: Callable[..., Any]) -> None:
    w = world(0)
    spine = _spine(w, 200)
    read = OfflineReader(FeatureRepo.model_validate(_definitions(w)), w.tables).read("user", spine)
    for row in read.to_pylist():
        time = row["request_time"]
        for feature, column in (("request_device", "device"), ("request_price", "price"), ("request_tags", "tags")):
            value = None if row[column] != row[column] else row[column]  # NaN is null
            expected = (None, MISSING) if time is None else (value, NULL if value is None else PRESENT)
            assert (row[feature], row[f"{feature}__status"]) == expected
        hour, weekday, month = (None,) * 3 if time is None else (time.hour, time.weekday(), time.month)
        assert (row["request_hour"], row["request_weekday"], row["request_month"]) == (hour, weekday, month)
        assert row["request_hour__status"] == (MISSING if time is None else PRESENT)
    assert {(row["user_id"] is None, row["request_device__status"]) for row in read.to_pylist()} >= {(True, PRESENT), (False, MISSING)}


def test_offline_equals_online_beside_stored_views(world: Callable[..., Any], store: OnlineStore) -> None:
    w = world(1)
    repo = FeatureRepo.model_validate(_definitions(w))
    materialize(repo, w.tables, store)
    spine = _spine(w, 500)
    offline, online = OfflineReader(repo, w.tables).read("user", spine), OnlineReader(repo, store).read("user", spine)
    assert _features(online).equals(_features(offline)) and online.schema.equals(offline.schema)
    without = OfflineReader(w.repo, w.tables).read("user", w.spine("user", 5)).column_names
    assert [name for name in repo.schema("user").names() if name in offline.column_names] == list(repo.schema("user").names())
    assert set(without) - set(offline.column_names) == {n for n in without if n.startswith("recent_")}
    for column in repo.schema("user").columns:
        assert offline.schema.field(column.name).type == column.arrow


def test_a_column_that_the_spine_lacks_is_missing(world: Callable[..., Any]) -> None:
    w = world(2)
    repo = FeatureRepo.model_validate(_definitions(w))
    read = OfflineReader(repo, w.tables).read("only", _spine(w, 20).drop_columns(["device", "tags"]))
    for name in ("request_device", "request_tags"):
        assert set(read.column(f"{name}__status").to_pylist()) == {MISSING} and read.column(name).null_count == read.num_rows
        assert read.schema.field(name).type == repo.schema("only").by_name[name].arrow
    assert PRESENT in read.column("request_price__status").to_pylist()
    with pytest.raises(SchemaError, match="spine of view 'context': column 'price': expected double, got string"):
        OfflineReader(repo, w.tables).read("only", _spine(w, 2).set_column(4, "price", pa.array(["x"] * 2)))


class _Closed(MemoryStore):
    """A store that nobody may look into."""

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        raise AssertionError("the store was asked")
        yield


def test_nothing_is_stored_and_nothing_is_looked_up(world: Callable[..., Any], store: OnlineStore) -> None:
    w = world(3)
    repo = FeatureRepo.model_validate(_definitions(w))
    report = materialize(repo, w.tables, store)
    assert "context" not in {view.view for view in report.views}
    with store.snapshot() as snapshot:
        assert "context" not in snapshot.states() and list(snapshot.scan("context")) == []
    spine = _spine(w, 50)
    online, offline = OnlineReader(repo, _Closed()).read("only", spine), OfflineReader(repo, {}).read("only", spine)
    assert _features(online).equals(_features(offline))
    with pytest.raises(ConfigError, match="source 'request' is request; only events can be appended"):
        append(repo, "request", spine, store)


def test_the_clock_is_utc(world: Callable[..., Any]) -> None:
    w = world(4)
    repo = FeatureRepo.model_validate(_definitions(w))
    times = [datetime(2024, 2, 29, 23, 59, 59, 999_999, UTC), datetime(1969, 12, 31, 23, 0, tzinfo=UTC)]
    spine = pa.table({"user_id": ["u", "u"], "request_time": pa.array(times, pa.timestamp("us", tz="UTC"))})
    for given in (spine, spine.set_column(1, "request_time", spine.column(1).cast(pa.timestamp("us", tz="Asia/Tokyo")))):
        read = OfflineReader(repo, {}).read("only", given)
        found = [read.column(f"request_{unit}").to_pylist() for unit in ("hour", "weekday", "month")]
        assert found == [[23, 23], [3, 2], [2, 12]]


@pytest.mark.parametrize(("feature", "key", "value"), [(0, "column", "platform"), (3, "unit", "month"), (1, "name", "request_cost")])
def test_versions_cover_them(world: Callable[..., Any], feature: int, key: str, value: str) -> None:
    w = world()
    definitions = _definitions(w)
    before = FeatureRepo.model_validate(definitions)
    definitions["views"][-1]["features"][feature][key] = value
    after = FeatureRepo.model_validate(definitions)
    changed = {name for name in ("user", "item", "only") if before.version(name) != after.version(name)}
    assert changed == {"user", "only"}
    assert before.view_version("activity") == w.repo.view_version("activity")


def _view(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(CONTEXT), **changes}


@pytest.mark.parametrize(
    ("source", "view", "message"),
    [
        (
            {"name": "request", "kind": "request", "table": "x"},
            _view(),
            "sources.2: source 'request' is the request itself: ",
        ),
        ({"name": "request", "kind": "request", "keys": ["user_id"]}, _view(), "expected neither table nor keys"),
        ({"name": "request", "kind": "static", "keys": ["user_id"]}, _view(), "sources.2.table: is required, but missing"),
        (
            {"name": "request", "kind": "static", "table": "t"},
            _view(),
            "sources.2.keys: source 'request' needs at least one column",
        ),
        ({"name": "request", "kind": "request"}, _view(entity="user"), "unknown key of source 'request' 'user'; did you mean 'user_id'"),
        ({"name": "request", "kind": "request"}, _view(ttl=5), "ttl: source 'request' is request: its rows have no age"),
        (
            {"name": "request", "kind": "request"},
            _view(features=[{"kind": "count", "name": "n"}]),
            "feature 'n' of kind 'count' needs events, but source 'request' is request",
        ),
        (
            {"name": "request", "kind": "request"},
            _view(source="events", features=[{"kind": "clock", "name": "n", "unit": "hour"}]),
            "feature 'n' of kind 'clock' needs a request, but source 'events' is a table of events",
        ),
        (
            {"name": "request", "kind": "request"},
            _view(features=[{"kind": "attribute", "name": "n", "column": "request_time", "type": "dense"}]),
            "column 'request_time' is the entity or a time",
        ),
        (
            {"name": "request", "kind": "request"},
            _view(features=[{"kind": "clock", "name": "n", "unit": "year"}]),
            "unit: Input should be 'hour'",
        ),
    ],
)
def test_what_is_refused(world: Callable[..., Any], source: dict[str, Any], view: dict[str, Any], message: str) -> None:
    definitions = _definitions(world())
    definitions["sources"][-1], definitions["views"][-1] = source, view
    with pytest.raises(ConfigError, match=message):
        parse(FeatureRepo, definitions, source="repo")
