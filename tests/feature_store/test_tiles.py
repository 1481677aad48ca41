# SPDX-License-Identifier: Apache-2.0
"""FS-12: aggregates of tiles against their definition in plain Python, offline against online, and state that is bounded."""

import copy
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from feature_store import evaluate, tiles
from feature_store.compiled import compile_view
from feature_store.definitions import FeatureRepo
from feature_store.drift import freshness
from feature_store.features import KINDS, Distinct, Quantile
from feature_store.materialize import append, materialize
from feature_store.offline import OfflineReader
from feature_store.online import MemoryStore, OnlineReader, OnlineStore
from feature_store.online.packing import unpack
from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.core.schema import TIME
from recsys.core.status import ValueStatus
from tests.feature_store.tiled_world import DEFINITIONS, EXPIRING, POPULAR, RECENT, TiledOracle, repo, tiled_features


def digest(store: OnlineStore) -> str:
    with store.snapshot() as snapshot:
        return snapshot.digest()


def whole(w: Any, given: dict[str, pa.Table] | None = None, **more: Any) -> str:
    store = MemoryStore()
    materialize(repo(), given or w.tables, store, **more)
    return digest(store)


def up_to(w: Any, seq: int) -> dict[str, pa.Table]:
    events = w.tables["interactions"]
    return dict(w.tables) | {"interactions": events.filter(pc.less(events.column("ingest_seq"), seq))}


def after(w: Any, service: str, count: int) -> pa.Table:
    """A spine of which every time is at or after the last event came to be known."""
    spine, events = w.spine(service, count), w.tables["interactions"]
    last = max(pc.max(events.column(name)).as_py() for name in ("event_time", "available_time"))
    times = [last + timedelta(seconds=w.rng.choice([0, 0, w.rng.random(), w.rng.randrange(400)])) for _ in range(spine.num_rows)]
    return spine.set_column(1, "request_time", pa.array(times, TIME))


def same(one: pa.Table, other: pa.Table) -> None:
    assert one.schema.equals(other.schema)
    for name in one.column_names:
        assert one.column(name).equals(other.column(name)), name


@pytest.mark.parametrize(("seed", "late"), [(0, 0.0), (1, 0.05), (2, 0.5), (3, 1.0)])
def test_offline_is_the_definition(world: Callable[..., Any], seed: int, late: float) -> None:
    w = world(seed, late=late)
    oracle, seen = TiledOracle(w.tables), set()
    for service, key in (("user", "user_id"), ("item", "item_id")):
        spine = w.spine(service, 300)
        rows = OfflineReader(repo(), w.tables).read(service, spine).to_pylist()
        for view, feature in tiled_features():
            if view["entity"] == key:
                for row in rows:
                    value, status = oracle.value(view, feature, row[key], row["request_time"])
                    got, name = (row[feature["name"]], row[f"{feature['name']}__status"]), feature["name"]
                    assert got[1] == status, (name, row[key], row["request_time"])
                    seen.add(status)
                    # Ints and floats to the bit; sketches that are large for this world are exact as well.
                    if feature.get("size") is None and feature.get("precision") != 4:
                        assert got[0] == value, (name, row[key], row["request_time"])
    assert seen == {ValueStatus.PRESENT, ValueStatus.NULL, ValueStatus.MISSING, ValueStatus.EXPIRED}


@pytest.mark.parametrize(("seed", "late"), [(10, 0.0), (11, 0.3), (12, 1.0)])
def test_online_is_offline_from_the_last_event_on(world: Callable[..., Any], store: OnlineStore, seed: int, late: float) -> None:
    """More than 10,000 questions for each store, to the last bit."""
    w = world(seed, count=1200, late=late)
    materialize(repo(), w.tables, store)
    for service in ("user", "item"):
        spine = after(w, service, 2000)
        same(OnlineReader(repo(), store).read(service, spine), OfflineReader(repo(), w.tables).read(service, spine))


def known_from(w: Any, key: str) -> dict[str, datetime]:
    """From when on all events of each entity count, but for the last `tiles.TAIL` of them."""
    counts: dict[str, list[datetime]] = {}
    for row in w.tables["interactions"].to_pylist():
        if row[key] is not None:
            counts.setdefault(row[key], []).append(max(row["event_time"], row["available_time"]))
    return {entity: sorted(times)[-tiles.TAIL - 1] for entity, times in counts.items() if len(times) > tiles.TAIL}


@pytest.mark.parametrize("tail", [0, 3, 16, 1000])
def test_earlier_times_are_right_or_errors(world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tail: int) -> None:
    """From the moment on when all but the newest events count the answer is exact, though the newest lie in the future of the question."""
    monkeypatch.setattr(tiles, "TAIL", tail)
    w, store = world(13, late=0.3), MemoryStore()
    materialize(repo(), w.tables, store)
    for service, key, feature in (("item", "item_id", "i_amount"), ("user", "user_id", "t_amount")):
        spine, since, errors = w.spine(service, 1000), known_from(w, key), 0
        online, offline = (r.read(service, spine).to_pylist() for r in (OnlineReader(repo(), store), OfflineReader(repo(), w.tables)))
        for row, expected in zip(online, offline, strict=True):
            if row["request_time"] is not None and row[key] in since and row["request_time"] < since[row[key]]:
                assert (row[feature], row[f"{feature}__status"]) == (None, ValueStatus.ERROR)
                errors += 1
            else:
                assert row == expected
        assert errors < len(online) and (errors > 0) == (tail < 1000)


def test_pieces_do_not_change_the_result(world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    w = world(14, late=0.5)
    spine = w.spine("user", 200)
    expected = OfflineReader(repo(), w.tables).read("user", spine)
    for module in (evaluate, tiles):
        monkeypatch.setattr(module, "PIECE_ROWS", 7)
        monkeypatch.setattr(module, "PIECE_EVENTS", 20)
    assert OfflineReader(repo(), w.tables).read("user", spine).equals(expected)


@pytest.mark.parametrize(("overlap", "tail"), [(0, 16), (50, 0), (50, 5)])
def test_step_by_step_equals_at_once(
    world: Callable[..., Any], store: OnlineStore, monkeypatch: pytest.MonkeyPatch, overlap: int, tail: int
) -> None:
    monkeypatch.setattr(tiles, "TAIL", tail)
    w = world(15, late=0.5)
    for seq in (0, 7, 150, 150, 399, 400, 400):
        materialize(repo(), up_to(w, seq), store, overlap=overlap)
        assert digest(store) == whole(w, up_to(w, seq), overlap=overlap)
    materialize(repo(), up_to(w, 100), store, overlap=overlap)  # older never overwrites newer
    assert digest(store) == whole(w, overlap=overlap)
    materialize(repo(), w.tables, store, overlap=overlap, full=True)
    assert digest(store) == whole(w, overlap=overlap)


@pytest.mark.parametrize("seed", range(5))
def test_any_steps_with_any_overlap_count_every_event_once(world: Callable[..., Any], seed: int) -> None:
    """Also where a row is committed late, or was appended before it was materialised."""
    w, store, rng = world(20 + seed, late=0.5), MemoryStore(), random.Random(seed)
    events = w.tables["interactions"]
    held_back = rng.sample(range(400), 20)
    seq = 0
    while seq < 400:
        seq = min(400, seq + rng.choice([1, 30, 90]))
        late = [place for place in held_back if place >= seq - 20 and rng.random() < 0.7]
        shown = up_to(w, seq)["interactions"]
        shown = shown.filter(pc.invert(pc.is_in(shown.column("ingest_seq"), pa.array(late, pa.int64()))))
        materialize(repo(), dict(w.tables) | {"interactions": shown}, store, overlap=rng.choice([120, 150]))
        if rng.random() < 0.5:
            ahead = events.filter(pc.is_in(events.column("ingest_seq"), pa.array(range(seq, seq + 10), pa.int64())))
            append(repo(), "events", ahead, store)
            append(repo(), "events", ahead, store)
    materialize(repo(), w.tables, store, overlap=120)
    for service in ("user", "item"):
        spine = after(w, service, 100)
        same(OnlineReader(repo(), store).read(service, spine), OfflineReader(repo(), w.tables).read(service, spine))


def test_an_interruption_leaves_nothing_behind(world: Callable[..., Any], store: OnlineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_store.materialize.BATCH_ENTITIES", 3)
    w = world(16, late=0.3)
    materialize(repo(), up_to(w, 200), store)
    before, calls, stop = digest(store), [], [0]

    def progress(view: str, written: int, total: int) -> None:
        calls.append(view)
        if len(calls) == stop[0]:
            raise KeyboardInterrupt

    materialize(repo(), up_to(w, 200), MemoryStore(), progress=lambda view, *_: calls.append(view))
    steps = len(calls)
    for at in range(1, steps + 1, 3):
        calls.clear()
        stop[0] = at
        with pytest.raises(KeyboardInterrupt):
            materialize(repo(), w.tables, store, progress=progress)
        assert digest(store) == before
    materialize(repo(), w.tables, store)
    assert digest(store) == whole(w)


def busy(w: Any, count: int, seconds: int) -> dict[str, pa.Table]:
    """So many events of one user within some seconds."""
    rng = np.random.default_rng(count)
    times = pa.array((np.arange(count) * seconds * 1_000_000 // count) + pa.scalar(w.at(0), TIME).cast(pa.int64()).as_py()).cast(TIME)
    columns = {
        "user_id": pa.array(["u"] * count),
        "item_id": pa.array([f"i{n}" for n in rng.integers(50, size=count)]),
        "event_time": times,
        "available_time": times,
        "ingest_seq": pa.array(np.arange(count)),
        "rating": pa.array(rng.integers(1, 6, count).astype(np.float64)),
        "amount": pa.array(rng.normal(size=count)),
        "channel": pa.array(["web"] * count),
    }
    return dict(w.tables) | {"interactions": pa.table(columns, schema=w.events_schema)}


def test_state_does_not_grow_with_events(world: Callable[..., Any]) -> None:
    w, sizes = world(), {}
    for count in (20_000, 100_000):
        store = MemoryStore()
        materialize(repo(), busy(w, count, 1000), store)
        with store.snapshot() as snapshot:
            for definition in (RECENT, EXPIRING):
                view = compile_view(repo(), str(definition["name"]))
                (value,) = snapshot.multi_get({view.view.name: ["u"]})[view.view.name]
                assert value is not None
                held = unpack([value], view.stored)[0].num_rows
                longest = max(feature.window for feature in view.view.features)  # type: ignore[union-attr, type-var]
                assert view.view.tile is not None and longest is not None
                assert 1 < held <= -(-longest // view.view.tile) + 1 + tiles.TAIL
                sizes[count, view.view.name] = len(value)
            (events,) = snapshot.multi_get({"activity": ["u"]})["activity"]
            assert events is not None
            sizes[count, "activity"] = len(events)
    assert sizes[100_000, "activity"] > 4.9 * sizes[20_000, "activity"]
    assert sizes[100_000, "tiled_expiring"] < 1.05 * sizes[20_000, "tiled_expiring"]
    # Of each tile: a sample of 1024 and one of 16 (two numbers of 9 bytes each), a code for each item, and what does not grow.
    assert sizes[100_000, "tiled"] < 11 * (18 * (1024 + 16) + 9 * 50 + 1000) + tiles.TAIL * 500


def test_a_late_event_changes_its_own_tile(world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TAIL", 0)
    w = world()
    view = compile_view(repo(), "tiled")
    times = [(10.0, 10.0), (40.0, 40.0), (100.0, 100.0), (41.0, 110.0), (200.0, 200.0), (35.0, 201.0)]
    rows = [
        {"user_id": "u", "event_time": w.at(at), "available_time": w.at(seen), "ingest_seq": n, "amount": 1.0}
        for n, (at, seen) in enumerate(times)
    ]
    store, held = MemoryStore(), []
    for count in (3, 4, 6):
        events = pa.Table.from_pylist(rows[:count], schema=w.events_schema)
        materialize(repo(), dict(w.tables) | {"interactions": events}, store)
        with store.snapshot() as snapshot:
            (value,) = snapshot.multi_get({"tiled": ["u"]})["tiled"]
        assert value is not None
        table = unpack([value], view.stored)[0]
        held.append(dict(zip(table.column("tile").to_pylist(), table.column("0.count").to_pylist(), strict=True)))
    first = min(held[0])
    counts = [{number - first: count for number, count in each.items()} for each in held]
    assert counts == [{0: 1, 1: 1, 3: 1}, {0: 1, 1: 2, 3: 1}, {0: 1, 1: 3, 3: 1, 6: 1}]


def test_an_event_known_long_after_its_window_is_still_an_event(world: Callable[..., Any]) -> None:
    w, store = world(), MemoryStore()
    row = {"user_id": "u", "event_time": w.at(0), "available_time": w.at(5000), "ingest_seq": 0, "amount": 3.0, "rating": 1.0}
    given = dict(w.tables) | {"interactions": pa.Table.from_pylist([row], schema=w.events_schema)}
    materialize(repo(), given, store)
    spine = pa.table({"user_id": ["u", "u"], "request_time": pa.array([w.at(5000), w.at(9000)], TIME)})
    online = OnlineReader(repo(), store).read("user", spine)
    same(online, OfflineReader(repo(), given).read("user", spine))
    assert online.column("t_count").to_pylist() == [0, 0]
    assert online.column("t_min__status").to_pylist() == [ValueStatus.NULL] * 2
    assert online.column("e_count__status").to_pylist() == [ValueStatus.EXPIRED] * 2


@pytest.mark.parametrize(("second", "count"), [(14.9, 0), (15, 1), (89.999999, 1), (90, 0), (104, 0)])
def test_the_tail_moves_by_whole_tiles(world: Callable[..., Any], second: float, count: int) -> None:
    """START is a multiple of 30 s. A window of 90 s loses an event of second 15 when ``t - 90`` reaches the event's tile."""
    w = world()
    row = {"user_id": "u", "event_time": w.at(15), "available_time": w.at(15), "ingest_seq": 0, "rating": 1.0}
    given = dict(w.tables) | {"interactions": pa.Table.from_pylist([row], schema=w.events_schema)}
    spine = pa.table({"user_id": ["u"], "request_time": pa.array([w.at(second)], TIME)})
    assert OfflineReader(repo(), given).read("user", spine).column("t_rating").to_pylist() == [float(count)]


def test_freshness_of_tiles_is_that_of_events(world: Callable[..., Any]) -> None:
    w, store = world(17), MemoryStore()
    materialize(repo(), w.tables, store)
    ages = freshness(repo(), store, w.at(5000))
    assert ages["tiled"] == ages["tiled_expiring"] == ages["activity"] and ages["tiled_items"] == ages["popularity"]


def test_a_view_that_loses_its_tiles_is_written_anew(world: Callable[..., Any]) -> None:
    w, store = world(18), MemoryStore()
    materialize(repo(), w.tables, store)
    changed = copy.deepcopy(DEFINITIONS)
    del changed["views"][-2]["tile"]
    changed["views"][-2]["features"] = changed["views"][-2]["features"][:1]
    other, fresh = FeatureRepo.model_validate(changed), MemoryStore()
    materialize(other, w.tables, store)
    materialize(other, w.tables, fresh)
    assert digest(store) == digest(fresh)


def test_versions_of_views_without_tiles_stay(world: Callable[..., Any]) -> None:
    w = world()
    for name in ("profile", "activity", "recent", "popularity"):
        assert repo().view_version(name) == w.repo.view_version(name)
        assert "tile" not in w.repo.view(name).model_dump(mode="json")
    assert repo().view("tiled").model_dump(mode="json")["tile"] == 30
    assert FeatureRepo.model_validate_json(repo().model_dump_json()) == repo()
    other = copy.deepcopy(DEFINITIONS)
    other["views"][-1]["tile"] = 50
    assert FeatureRepo.model_validate(other).view_version("tiled_items") != repo().view_version("tiled_items")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": None}, "feature 't_min' of kind 'min' needs a view with tiles: expected the key 'tile' of the view, got none"),
        ({"tile": 0}, "tile: Input should be greater than 0"),
        ({"tile": 61}, "feature 't_max' of kind 'max': window: expected at least the view's tile of 61 s, got 60"),
        (
            {"features": [{"kind": "count", "name": "x"}]},
            "'x' of kind 'count': window: expected at least the view's tile of 30 s, got None",
        ),
        ({"features": [{"kind": "age", "name": "x"}]}, "'x' of kind 'age' is not made of tiles: expected an aggregate"),
        (
            {"features": [{"kind": "distinct", "name": "x", "column": "rating", "window": 60, "dtype": "float"}]},
            r"features\.0\.dtype",
        ),
        (
            {"features": [{"kind": "quantile", "name": "x", "column": "rating", "window": 60, "q": 1.5}]},
            "q: Input should be less than or equal to 1",
        ),
        ({"source": "people", "features": [{"kind": "count", "name": "x", "window": 60}]}, "needs events, but source 'people' is static"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    definitions = copy.deepcopy(DEFINITIONS)
    definitions["views"][-3] = {**RECENT, **change}
    with pytest.raises(ConfigError, match=message):
        parse(FeatureRepo, definitions, source="repo")


def test_kinds_say_what_can_be_taken_away_and_how_far_they_are_off() -> None:
    invertible = {name for name, kind in KINDS.items() if getattr(kind, "invertible", False)}
    assert invertible == {"count", "sum", "mean"}
    assert {name for name, kind in KINDS.items() if hasattr(kind, "invertible")} - invertible == {"min", "max", "distinct", "quantile"}
    assert Distinct(name="x", column="c", precision=10).error == pytest.approx(1.04 / 32)
    assert Quantile(name="x", column="c", q=0.5, size=1024).error == pytest.approx(0.0509, abs=1e-4)
    assert POPULAR["tile"] == 100
