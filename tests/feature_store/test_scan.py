# SPDX-License-Identifier: Apache-2.0
"""FS-15: the history of all entities equals a read at their own times. FS-2: leaving available times out is asked for, and said."""

import copy
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from feature_store.definitions import FeatureRepo
from feature_store.offline import OfflineReader
from feature_store.scan import scan
from recsys.core.errors import ConfigError


def _own_times(w: Any, key: str, start: datetime, end: datetime) -> list[tuple[str, datetime]]:
    rows = w.tables["interactions"].to_pylist()
    return sorted({(row[key], row["event_time"]) for row in rows if row[key] is not None and start <= row["event_time"] < end})


@pytest.mark.parametrize(("service", "key"), [("user", "user_id"), ("item", "item_id")])
@pytest.mark.parametrize("rows", [17, 10_000])
def test_a_scan_equals_a_read_at_the_entities_own_times(world: Callable[..., Any], service: str, key: str, rows: int) -> None:
    w = world(0)
    start, end = w.at(200), w.at(700)
    pieces = list(scan(w.repo, w.tables, service, start, end, rows=rows))
    expected = _own_times(w, key, start, end)
    assert [piece.num_rows for piece in pieces] == [min(rows, len(expected) - first) for first in range(0, len(expected), rows)]
    whole = pa.concat_tables(pieces)
    assert list(zip(whole.column(key).to_pylist(), whole.column("request_time").to_pylist(), strict=True)) == expected
    spine = pa.table({key: [k for k, _ in expected], "request_time": pa.array([t for _, t in expected], pa.timestamp("us", tz="UTC"))})
    assert whole.equals(OfflineReader(w.repo, w.tables).read(service, spine))
    assert w.tables["interactions"].num_rows > len(expected) > 100


def test_the_bounds_are_closed_before_and_open_after(world: Callable[..., Any]) -> None:
    w = world(1)
    rows = [("u", 10.0), ("u", 20.0), ("u", 20.0), ("v", 30.0), ("v", 29.999999), ("u", 9.999999)]
    events = [
        {"user_id": user, "item_id": "i", "event_time": w.at(second), "available_time": w.at(second), "ingest_seq": n}
        for n, (user, second) in enumerate(rows)
    ]
    tables = w.tables | {"interactions": pa.Table.from_pylist(events, schema=w.events_schema)}
    (piece,) = scan(w.repo, tables, "user", w.at(10), w.at(30))
    assert piece.column("user_id").to_pylist() == ["u", "u", "v"]
    assert piece.column("events").to_pylist() == [2, 4, 1]
    assert list(scan(w.repo, tables, "user", w.at(31), w.at(90))) == []


def test_times_of_all_event_sources_of_the_service(world: Callable[..., Any]) -> None:
    w = world(2)
    definitions = copy.deepcopy(w.definitions)
    definitions["sources"].append({"name": "clicks", "kind": "events", "table": "clicks", "keys": ["user_id"]})
    definitions["views"].append(
        {"name": "clicked", "source": "clicks", "entity": "user_id", "features": [{"kind": "count", "name": "clicks"}]}
    )
    definitions["services"].append({"name": "both", "views": ["profile", "clicked", "activity"]})
    repo = FeatureRepo.model_validate(definitions)
    clicks = w.random_events(w.rng, 50, late=0.0)
    pieces = pa.concat_tables(scan(repo, w.tables | {"clicks": clicks}, "both", w.at(0), w.at(500), rows=40))
    rows = [*clicks.to_pylist(), *w.tables["interactions"].to_pylist()]
    expected = sorted(
        {(r["user_id"], r["event_time"]) for r in rows if r["user_id"] is not None and w.at(0) <= r["event_time"] < w.at(500)}
    )
    assert list(zip(pieces.column("user_id").to_pylist(), pieces.column("request_time").to_pylist(), strict=True)) == expected


def test_what_a_scan_refuses(world: Callable[..., Any]) -> None:
    w = world(3)
    definitions = copy.deepcopy(w.definitions)
    definitions["services"].append({"name": "static", "views": ["profile"]})
    repo = FeatureRepo.model_validate(definitions)
    with pytest.raises(ConfigError, match="feature service 'static': expected a view of events"):
        scan(repo, w.tables, "static", w.at(0), w.at(1))
    with pytest.raises(ConfigError, match="unknown feature service 'usr'; did you mean 'user'"):
        scan(repo, w.tables, "usr", w.at(0), w.at(1))
    with pytest.raises(ConfigError, match="rows: expected at least 1, got 0"):
        scan(repo, w.tables, "user", w.at(0), w.at(1), rows=0)


def test_without_available_times_an_event_counts_from_its_own_time_on(world: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    w = world(4, late=0.5)
    spine = w.spine("user", 150)
    with caplog.at_level(logging.WARNING):
        default = OfflineReader(w.repo, w.tables).read("user", spine)
        assert caplog.text == ""
        reader = OfflineReader(w.repo, w.tables, ignore_available_time=True)
    assert "ignore_available_time: an event counts from its event_time on" in caplog.text
    ignoring = reader.read("user", spine)
    events = w.tables["interactions"]
    at_once = w.tables | {"interactions": events.set_column(3, "available_time", events.column("event_time"))}
    w.check(w.definitions, at_once, "user", spine, ignoring)
    w.check(w.definitions, w.tables, "user", spine, default)
    assert pc.sum(ignoring.column("events")).as_py() > pc.sum(default.column("events")).as_py()
