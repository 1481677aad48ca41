# SPDX-License-Identifier: Apache-2.0
"""A small random world, and a reader in plain Python that says what every feature must be."""

import math
import random
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from benchmarks.feature_store.servers import redis_server
from feature_store.definitions import FeatureRepo
from feature_store.online import OnlineStore
from recsys.core.components import get, names
from recsys.core.status import ValueStatus

START = datetime(2024, 1, 1, tzinfo=UTC)
TIME = pa.timestamp("us", tz="UTC")
SPAN = 1000  # seconds

REPO = {
    "sources": [
        {"name": "events", "kind": "events", "table": "interactions", "keys": ["user_id", "item_id"]},
        {"name": "people", "kind": "static", "table": "users", "keys": ["user_id"]},
    ],
    "views": [
        {
            "name": "profile",
            "source": "people",
            "entity": "user_id",
            "features": [
                {"kind": "attribute", "name": "job", "column": "job", "type": "categorical"},
                {"kind": "attribute", "name": "years", "column": "years", "type": "dense", "dtype": "int"},
                {"kind": "attribute", "name": "likes", "column": "likes", "type": "bag"},
            ],
        },
        {
            "name": "activity",
            "source": "events",
            "entity": "user_id",
            "features": [
                {"kind": "count", "name": "events"},
                {"kind": "count", "name": "events_60", "window": 60},
                {"kind": "count", "name": "good", "where": [{"column": "rating", "op": ">=", "value": 4}]},
                {
                    "kind": "count",
                    "name": "good_web_200",
                    "window": 200,
                    "where": [
                        {"column": "rating", "op": ">", "value": 2},
                        {"column": "channel", "op": "==", "value": "web"},
                        {"column": "rating", "op": "<", "value": 5},
                    ],
                },
                {"kind": "mean", "name": "rating_mean", "column": "rating"},
                {"kind": "mean", "name": "rating_mean_100", "column": "rating", "window": 100},
                {"kind": "mean", "name": "amount_mean", "column": "amount", "where": [{"column": "channel", "op": "!=", "value": "app"}]},
                {"kind": "sum", "name": "amount_300", "column": "amount", "window": 300},
                {"kind": "last_n", "name": "items_4", "column": "item_id", "n": 4},
                {"kind": "last_n", "name": "ratings_4", "column": "rating", "n": 4, "dtype": "float"},
                {"kind": "elapsed", "name": "elapsed_4", "n": 4},
                {"kind": "last_n", "name": "items_all", "column": "item_id", "n": 1000},
                {"kind": "age", "name": "age"},
                {"kind": "attribute", "name": "last_channel", "column": "channel", "type": "categorical"},
            ],
        },
        {
            "name": "recent",
            "source": "events",
            "entity": "user_id",
            "ttl": 50,
            "features": [
                {"kind": "count", "name": "recent_events"},
                {"kind": "sum", "name": "recent_amount", "column": "amount"},
                {"kind": "mean", "name": "recent_mean", "column": "rating"},
                {"kind": "last_n", "name": "recent_items", "column": "item_id", "n": 3},
                {"kind": "attribute", "name": "recent_rating", "column": "rating", "type": "dense"},
            ],
        },
        {
            "name": "popularity",
            "source": "events",
            "entity": "item_id",
            "features": [
                {"kind": "count", "name": "item_events_300", "window": 300},
                {"kind": "mean", "name": "item_rating", "column": "rating"},
                {"kind": "last_n", "name": "item_users", "column": "user_id", "n": 2},
            ],
        },
    ],
    "services": [{"name": "user", "views": ["profile", "activity", "recent"]}, {"name": "item", "views": ["popularity"]}],
}
KEY = {"user": "user_id", "item": "item_id"}
EVENTS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("event_time", TIME),
        ("available_time", TIME),
        ("ingest_seq", pa.int64()),
        ("rating", pa.float64()),
        ("amount", pa.float64()),
        ("channel", pa.string()),
    ]
)
USERS = pa.schema([("user_id", pa.string()), ("job", pa.string()), ("years", pa.int64()), ("likes", pa.list_(pa.string()))])


def at(seconds: float) -> datetime:
    """A time of the random world."""
    return START + timedelta(seconds=seconds)


def random_events(rng: random.Random, count: int, *, late: float) -> pa.Table:
    """Events with ties, nulls and NaN, of which the share ``late`` becomes available after their time; ``ingest_seq`` follows arrival."""
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        happened = rng.randrange(SPAN) + rng.choice([0.0, 0.0, 0.25])
        lag = rng.choice([1.0, 30.0, rng.random() * SPAN]) if rng.random() < late else 0.0
        rows.append(
            {
                "user_id": rng.choice(["u0", "u1", "u2", "u3", "u4", "u5", "ü6", None]),
                "item_id": rng.choice([*(f"i{i}" for i in range(9)), None]),
                "event_time": at(happened),
                "available_time": at(happened + lag - rng.choice([0.0, 0.0, 2.0])),
                "rating": rng.choice([1.0, 2.0, 3.0, 4.0, 5.0, None, math.nan]),
                "amount": rng.choice([rng.gauss(0, 1e3), rng.random() * 1e-7, -0.1, None]),
                "channel": rng.choice(["web", "app", "", None]),
            }
        )
    rows.sort(key=lambda row: row["available_time"])
    for seq, row in enumerate(rows):
        row["ingest_seq"] = seq
    rng.shuffle(rows)
    return pa.Table.from_pylist(rows, schema=EVENTS)


def random_users(rng: random.Random) -> pa.Table:
    rows = [
        {
            "user_id": user,
            "job": rng.choice(["cook", "", None]),
            "years": rng.choice([None, 2**60 + 1, -3]),
            "likes": rng.choice([None, [], ["a", None, "ß"], ["b"]]),
        }
        for user in ["u9", "u1", "ü6", "u0", "u3", None]
    ]
    return pa.Table.from_pylist(rows, schema=USERS)


def random_spine(rng: random.Random, key: str, count: int) -> pa.Table:
    """Rows in no order, some of unknown entities, some null, some twice."""
    known = {"user_id": ["u0", "u1", "u2", "u3", "u4", "u5", "ü6"], "item_id": [f"i{i}" for i in range(9)]}[key]
    entities = [rng.choice([*known, *known, "nobody", None]) for _ in range(count)]
    times = [
        rng.choice([at(rng.randrange(-20, SPAN + 100)), at(rng.random() * SPAN), *[None] * (rng.random() < 0.05)]) for _ in range(count)
    ]
    columns = {"label": pa.array(range(count)), "request_time": pa.array(times, TIME), key: pa.array(entities, pa.string())}
    return pa.table({name: pa.concat_arrays([column, column[: count // 10]]) for name, column in columns.items()})


class Oracle:
    """Evaluates a repo's definitions row by row, with lists and loops only."""

    def __init__(self, repo: dict[str, Any], tables: Mapping[str, pa.Table]) -> None:
        self._repo = repo
        self._tables = {name: [_clean(row) for row in table.to_pylist()] for name, table in tables.items()}

    def read(self, service: str, entity: str | None, time: datetime | None) -> dict[str, tuple[Any, ValueStatus]]:
        """Each feature's value and status."""
        names = next(s["views"] for s in self._repo["services"] if s["name"] == service)
        result = {}
        for view in (v for v in self._repo["views"] if v["name"] in names):
            source = next(s for s in self._repo["sources"] if s["name"] == view["source"])
            rows = [row for row in self._tables[source["table"]] if row[view["entity"]] == entity]
            if source["kind"] == "events" and time is not None:
                rows = [row for row in rows if row["event_time"] <= time and row["available_time"] <= time]
                rows.sort(key=lambda row: (row["event_time"], row["ingest_seq"]))
            for feature in view["features"]:
                value, status = (None, ValueStatus.MISSING) if entity is None or time is None else _value(feature, rows, time)
                expired = "ttl" in view and rows and entity is not None and time is not None
                if expired and (time - rows[-1]["event_time"]).total_seconds() > view["ttl"]:
                    value, status = None, ValueStatus.EXPIRED
                result[feature["name"]] = (value, status)
        return result


def _clean(row: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}


def _value(feature: dict[str, Any], rows: list[dict[str, Any]], time: datetime) -> tuple[Any, ValueStatus]:
    kind = feature["kind"]
    if kind in ("count", "sum", "mean"):
        chosen = [row for row in rows if _chosen(feature, row, time)]
        if kind == "count":
            return len(chosen), ValueStatus.PRESENT
        values = [row[feature["column"]] for row in chosen if row[feature["column"]] is not None]
        if kind == "sum":
            return math.fsum(values), ValueStatus.PRESENT
        if not rows:
            return None, ValueStatus.MISSING
        return (math.fsum(values) / len(values), ValueStatus.PRESENT) if values else (None, ValueStatus.NULL)
    if not rows:
        return None, ValueStatus.MISSING
    if kind == "attribute":
        value = rows[-1][feature["column"]]
        return value, ValueStatus.NULL if value is None else ValueStatus.PRESENT
    if kind == "age":
        return (time - rows[-1]["event_time"]) / timedelta(seconds=1), ValueStatus.PRESENT
    last = rows[-feature["n"] :]
    if kind == "elapsed":
        return [(time - row["event_time"]) / timedelta(seconds=1) for row in last], ValueStatus.PRESENT
    return [row[feature["column"]] for row in last], ValueStatus.PRESENT


def _chosen(feature: dict[str, Any], row: dict[str, Any], time: datetime) -> bool:
    if "window" in feature and not row["event_time"] > time - timedelta(seconds=feature["window"]):
        return False
    for condition in feature.get("where", ()):
        value, bound = row[condition["column"]], condition["value"]
        if value is None:
            return False
        holds = {"==": value == bound, "!=": value != bound}
        if not isinstance(bound, str):
            holds |= {"<": value < bound, "<=": value <= bound, ">": value > bound, ">=": value >= bound}
        if not holds[condition["op"]]:
            return False
    return True


def check(repo: dict[str, Any], tables: Mapping[str, pa.Table], service: str, spine: pa.Table, result: pa.Table) -> None:
    """Assert that ``result`` is the spine with the features that the oracle finds."""
    assert result.num_rows == spine.num_rows
    assert result.select(spine.column_names).equals(spine)
    oracle, key = Oracle(repo, tables), KEY[service]
    rows = result.to_pylist()
    for row in rows:
        for name, (value, status) in oracle.read(service, row[key], row["request_time"]).items():
            where = (name, row[key], row["request_time"])
            assert row[f"{name}__status"] == status, where
            if isinstance(value, float):
                assert row[name] == pytest.approx(value, rel=1e-12, abs=1e-9), where
            else:
                assert row[name] == value, where


class World:
    """Everything above, for one seed."""

    at = staticmethod(at)
    check = staticmethod(check)
    random_spine = staticmethod(random_spine)
    random_events = staticmethod(random_events)
    definitions = REPO
    events_schema = EVENTS

    def __init__(self, seed: int = 0, count: int = 400, late: float = 0.3) -> None:
        self.rng = random.Random(seed)
        self.tables = {"interactions": random_events(self.rng, count, late=late), "users": random_users(self.rng)}
        self.repo = FeatureRepo.model_validate(REPO)

    def spine(self, service: str, count: int) -> pa.Table:
        return random_spine(self.rng, KEY[service], count)


@pytest.fixture(scope="session")
def world() -> Callable[..., World]:
    """Makes a random world from a seed."""
    return World


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """Of a real server, which starts when the first test asks for it."""
    with tempfile.TemporaryDirectory(prefix="redis") as folder, redis_server(Path(folder)) as port:
        yield f"redis://127.0.0.1:{port}/0"


@pytest.fixture(params=names("online_store"))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> OnlineStore:
    """An empty one of each kind that there is."""
    cls = get("online_store", request.param)
    given: dict[str, Any] = {"path": tmp_path / "store"} if "path" in cls.Config.model_fields else {}
    if request.param == "redis":
        given = {"url": request.getfixturevalue("redis_url"), "prefix": uuid.uuid4().hex}
    made: OnlineStore = cls(cls.Config(**given))
    request.addfinalizer(made.close)
    return made
