# SPDX-License-Identifier: Apache-2.0
"""Offline values against an oracle in plain Python, and the rules of time, status and rows."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_store import evaluate
from feature_store.definitions import FeatureRepo
from feature_store.offline import OfflineReader
from recsys.core.errors import ConfigError, DataError, SchemaError
from recsys.core.status import ValueStatus

PRESENT, NULL, MISSING, EXPIRED = ValueStatus.PRESENT, ValueStatus.NULL, ValueStatus.MISSING, ValueStatus.EXPIRED


@pytest.mark.parametrize("service", ["user", "item"])
@pytest.mark.parametrize(("seed", "late"), [(0, 0.0), (1, 0.05), (2, 0.5), (3, 1.0)])
def test_equals_brute_force(world: Callable[..., Any], service: str, seed: int, late: float) -> None:
    w = world(seed, late=late)
    spine = w.spine(service, 150)
    w.check(w.definitions, w.tables, service, spine, OfflineReader(w.repo, w.tables).read(service, spine))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("seed", "late"), [(10, 0.02), (11, 0.3), (12, 1.0)])
def test_late_events_among_many_equal_brute_force(world: Callable[..., Any], seed: int, late: float, exact: bool) -> None:
    """Where sums are exact, only what happened after the first late event is picked out; every kind, window and condition."""
    w = world(seed, late=late)
    events = w.tables["interactions"]
    if exact:
        amounts = pa.array([w.rng.choice([None, 0.25, -3.5, 1024.0]) for _ in range(events.num_rows)])
        events = events.set_column(events.schema.get_field_index("amount"), "amount", amounts)
    short = [view | {"features": [f for f in view["features"] if f["name"] != "items_all"]} for view in w.definitions["views"]]
    definitions = w.definitions | {"views": short}
    tables = w.tables | {"interactions": events}
    for service in ("user", "item"):
        spine = w.spine(service, 200)
        w.check(definitions, tables, service, spine, OfflineReader(FeatureRepo.model_validate(definitions), tables).read(service, spine))


def test_what_a_late_event_costs_does_not_grow_with_what_was_before(world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    w, picked = world(), []
    pick = evaluate.pick
    monkeypatch.setattr(evaluate, "pick", lambda log, rows: (found := pick(log, rows), picked.append(len(found[0])))[0])
    definitions = w.definitions | {"views": [view for view in w.definitions["views"] if view["name"] == "popularity"]}
    definitions["services"] = [{"name": "item", "views": ["popularity"]}]
    for before in (100, 10_000):
        times = [(float(n), float(n)) for n in range(before)] + [(float(before), before + 5.0), (before + 1.0, before + 1.0)]
        events = _one_user(w, times)
        events = events.set_column(1, "item_id", pa.array(["i"] * len(times)))
        spine = pa.table({"item_id": ["i"], "request_time": pa.array([w.at(before + 2)], pa.timestamp("us", tz="UTC"))})
        row = OfflineReader(FeatureRepo.model_validate(definitions), {"interactions": events}).read("item", spine).to_pylist()[0]
        assert (row["item_events_300"], row["item_rating"]) == (min(before + 1, 298), 1.0)
    assert picked == [3, 3]


def test_pieces_do_not_change_the_result(world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    w = world(4)
    spine = w.spine("user", 60)
    whole = OfflineReader(w.repo, w.tables).read("user", spine)
    monkeypatch.setattr(evaluate, "PIECE_ROWS", 7)
    monkeypatch.setattr(evaluate, "PIECE_EVENTS", 20)
    in_pieces = OfflineReader(w.repo, w.tables).read("user", spine)
    assert in_pieces.column("events").num_chunks >= 60 / 7
    assert in_pieces.equals(whole)


@pytest.mark.parametrize("cuts", [(0, 0, 40), (1, 70, 71), tuple(range(5, 105, 5))])
@pytest.mark.parametrize("service", ["user", "item"])
def test_how_a_table_is_cut_into_chunks_does_not_change_the_result(world: Callable[..., Any], service: str, cuts: tuple[int, ...]) -> None:
    w = world(8, late=0.1)
    spine = w.spine(service, 100)

    def cut(table: pa.Table) -> pa.Table:
        places = [0, *(min(place, table.num_rows) for place in cuts), table.num_rows]
        parts = [table.slice(begin, end - begin).combine_chunks() for begin, end in itertools.pairwise(places)]
        columns = {name: pa.chunked_array([part.column(name).combine_chunks() for part in parts]) for name in table.column_names}
        return pa.table(columns, table.schema)

    in_chunks = {name: cut(table) for name, table in w.tables.items()}
    assert all(table.column(0).num_chunks == len(cuts) + 1 for table in in_chunks.values())
    assert OfflineReader(w.repo, in_chunks).read(service, spine).equals(OfflineReader(w.repo, w.tables).read(service, spine))


def test_types_are_those_of_the_schema(world: Callable[..., Any]) -> None:
    w = world(5)
    reader = OfflineReader(w.repo, w.tables)
    for service, key in (("user", "user_id"), ("item", "item_id")):
        schema = w.repo.schema(service)
        for count in (0, 5):
            result = reader.read(service, w.random_spine(w.rng, key, count))
            assert result.num_rows == (0 if count == 0 else 5)
            for column in schema.columns:
                assert result.schema.field(column.name).type == column.arrow
                assert result.schema.field(f"{column.name}__status").type == pa.uint8()


def test_a_value_that_is_not_present_is_null(world: Callable[..., Any]) -> None:
    w = world(6)
    result = OfflineReader(w.repo, w.tables).read("user", w.spine("user", 300))
    seen = set()
    for column in w.repo.schema("user").columns:
        status = np.asarray(result.column(f"{column.name}__status"))
        assert (np.asarray(result.column(column.name).is_null()) == (status != PRESENT)).all()
        seen |= set(status.tolist())
    assert seen == {PRESENT, NULL, MISSING, EXPIRED}


def test_backfill_never_changes_the_past(world: Callable[..., Any]) -> None:
    """FS-2: events that become available after t, whenever they happened, do not show in a row for t."""
    w = world(7)
    spine = w.spine("user", 200)
    before = OfflineReader(w.repo, w.tables).read("user", spine)
    late = w.random_events(random.Random(70), 300, late=1.0)
    after_all = pa.array([w.at(2000.0)] * late.num_rows, late.schema.field("available_time").type)
    late = late.set_column(late.schema.get_field_index("available_time"), "available_time", after_all)
    late = late.set_column(late.schema.get_field_index("ingest_seq"), "ingest_seq", pa.array(range(10_000, 10_300)))
    tables = w.tables | {"interactions": pa.concat_tables([w.tables["interactions"], late])}
    after = OfflineReader(w.repo, tables).read("user", spine)
    assert after.equals(before)


def test_an_event_counted_twice_counts_once(world: Callable[..., Any]) -> None:
    w = world(8)
    spine = w.spine("user", 100)
    once = OfflineReader(w.repo, w.tables).read("user", spine)
    events = w.tables["interactions"]
    twice = OfflineReader(w.repo, w.tables | {"interactions": pa.concat_tables([events, events[10:60]])}).read("user", spine)
    assert twice.equals(once)


def _one_user(w: Any, seconds: list[tuple[float, float]]) -> pa.Table:
    rows = [
        {"user_id": "u", "item_id": f"i{n}", "event_time": w.at(event), "available_time": w.at(available), "ingest_seq": n, "rating": 1.0}
        for n, (event, available) in enumerate(seconds)
    ]
    return pa.Table.from_pylist(rows, schema=w.events_schema)


def _read_one(w: Any, events: pa.Table, second: float) -> dict[str, Any]:
    spine = pa.table({"user_id": ["u"], "request_time": pa.array([w.at(second)], pa.timestamp("us", tz="UTC"))})
    row: dict[str, Any] = OfflineReader(w.repo, w.tables | {"interactions": events}).read("user", spine).to_pylist()[0]
    return row


@pytest.mark.parametrize(
    ("second", "status"), [(99.999999, MISSING), (100, PRESENT), (150, PRESENT), (150.000001, EXPIRED), (152, EXPIRED)]
)
def test_ttl_boundary(world: Callable[..., Any], second: float, status: ValueStatus) -> None:
    """FS-4: an age of exactly the time to live, 50 s, is still PRESENT. Counts and sums are 0 and PRESENT before the first event."""
    w = world()
    row = _read_one(w, _one_user(w, [(10, 100), (100, 100)]), second)
    additive = PRESENT if status is MISSING else status
    assert row["recent_items__status"] == row["recent_rating__status"] == row["recent_mean__status"] == status
    assert row["recent_events__status"] == row["recent_amount__status"] == additive
    assert row["recent_events"] == {99.999999: 0, 100: 2, 150: 2}.get(second)
    assert row["recent_items"] == (["i0", "i1"] if status is PRESENT else None)


@pytest.mark.parametrize(("second", "count"), [(99, 0), (100, 1), (159.999999, 1), (160, 0)])
def test_window_is_open_before_and_closed_after(world: Callable[..., Any], second: float, count: int) -> None:
    w = world()
    assert _read_one(w, _one_user(w, [(100, 100)]), second)["events_60"] == count


def test_order_is_by_event_time_then_ingest_seq(world: Callable[..., Any]) -> None:
    w = world()
    events = _one_user(w, [(50, 50), (40, 90), (50, 50), (50, 70)])
    assert _read_one(w, events.take([3, 1, 2, 0]), 60)["items_all"] == ["i0", "i2"]
    assert _read_one(w, events.take([3, 1, 2, 0]), 90)["items_all"] == ["i1", "i0", "i2", "i3"]


def test_spine_of_another_time_zone(world: Callable[..., Any]) -> None:
    w = world(9)
    spine = w.spine("user", 50)
    utc = OfflineReader(w.repo, w.tables).read("user", spine)
    times = spine.column("request_time")
    for other in (
        times.cast(pa.timestamp("us", tz="America/New_York")),
        times.cast(pa.timestamp("us")),
        times.cast(pa.timestamp("ns", tz="UTC")),
    ):
        result = OfflineReader(w.repo, w.tables).read("user", spine.set_column(1, "request_time", other))
        assert result.schema.field("request_time").type == other.type
        assert result.drop_columns(["request_time"]).equals(utc.drop_columns(["request_time"]))


def test_an_entity_has_equal_values_in_every_log(world: Callable[..., Any]) -> None:
    """Sums do not round differently when other entities, or huge values that are not counted, stand in the log."""
    w = world(10)
    events = w.tables["interactions"].filter(pa.compute.equal(w.tables["interactions"].column("user_id"), "u1"))
    huge = pa.Table.from_pylist(
        [
            {"user_id": user, "event_time": w.at(second), "available_time": w.at(available), "ingest_seq": 9000 + n, "amount": 1e300}
            for n, (user, second, available) in enumerate([("u1", -900, -900), ("u1", 500, 5000), ("a", 0, 0), ("z", 0, 0)])
        ],
        schema=w.events_schema,
    )
    times = [w.at(w.rng.random() * 1000) for _ in range(200)]
    spine = pa.table({"user_id": ["u1"] * 200, "request_time": pa.array(times, pa.timestamp("us", tz="UTC"))})
    alone, beside = (
        OfflineReader(w.repo, w.tables | {"interactions": table}).read("user", spine).column("amount_300")
        for table in (events, pa.concat_tables([huge, events]))
    )
    assert alone.equals(beside)


def test_values_may_come_in_other_arrow_types(world: Callable[..., Any]) -> None:
    w = world(11)
    spine = w.spine("user", 50)
    expected = OfflineReader(w.repo, w.tables).read("user", spine)
    events = w.tables["interactions"]
    for name, kind in {"user_id": pa.dictionary(pa.int32(), pa.string()), "item_id": pa.large_string(), "ingest_seq": pa.int32()}.items():
        place = events.schema.get_field_index(name)
        values = events.column(name)
        events = events.set_column(place, name, values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind))
    assert OfflineReader(w.repo, w.tables | {"interactions": events}).read("user", spine).equals(expected)


def _without(table: pa.Table, column: str) -> pa.Table:
    return table.drop_columns([column])


def _with(table: pa.Table, column: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(column), column, values)


def test_errors_name_what_is_wrong(world: Callable[..., Any]) -> None:
    w = world(12)
    spine, events, users = w.spine("user", 5), w.tables["interactions"], w.tables["users"]

    def read(service: str = "user", given: pa.Table = spine, **tables: pa.Table) -> None:
        OfflineReader(w.repo, {**w.tables, **tables}).read(service, given)

    with pytest.raises(ConfigError, match="unknown feature service 'usr'; did you mean 'user'"):
        read("usr")
    with pytest.raises(DataError, match="source 'events': unknown table 'interactions'; did you mean 'interaction'"):
        OfflineReader(w.repo, {"interaction": events, "users": users}).read("user", spine)
    with pytest.raises(SchemaError, match="spine: missing column: unknown column 'request_time'"):
        read(given=_without(spine, "request_time"))
    with pytest.raises(SchemaError, match="spine: column 'age' has the name of a feature"):
        read(given=spine.append_column("age", pa.nulls(spine.num_rows)))
    with pytest.raises(SchemaError, match=r"table 'interactions' of view 'activity': missing column: unknown column 'rating'"):
        read(interactions=_without(events, "rating"))
    with pytest.raises(SchemaError, match=r"column 'years': expected int64, got double"):
        read(users=_with(users, "years", pa.array([0.5] * users.num_rows)))
    with pytest.raises(DataError, match=r"table 'interactions' .*: expected a value of 'available_time' in every row, but 3\d\d are null"):
        read(interactions=_with(events, "available_time", pa.nulls(events.num_rows, pa.timestamp("us", tz="UTC"))))
    with pytest.raises(DataError, match=r"table 'users' of view 'profile': expected one row for each user_id, but 'u1' has several"):
        read(users=pa.concat_tables([users, users[1:2]]))


def test_a_repo_survives_json(world: Callable[..., Any]) -> None:
    w = world(13)
    assert FeatureRepo.model_validate_json(w.repo.model_dump_json()) == w.repo
