# SPDX-License-Identifier: Apache-2.0
"""The benchmark beside Feast without Feast: its data, our side of it, the comparison of values, and the checks of made-up measurements."""

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.feature_store import data
from benchmarks.feature_store.compare import same_values
from benchmarks.feature_store.data import Sizes
from benchmarks.feature_store.measure import peak_bytes
from benchmarks.feature_store.ours import Contestant, bare_join, frame
from benchmarks.feature_store.report import Joins, Online, result
from benchmarks.feature_store.servers import redis_server
from recsys.core.status import ValueStatus

SIZES = Sizes(2_000, 500)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, keys in (("join", ["user_id"]), ("online", data.KEYS)):
        (tmp_path / name).mkdir()
        for key in keys:
            data.write(tmp_path / name, key, SIZES)
    return tmp_path


def test_times_are_distinct_and_tables_repeat() -> None:
    table = data.feature_table("user_id", 5_000)
    assert table.column("event_time").combine_chunks().unique().__len__() == 5_000
    assert table.equals(data.feature_table("user_id", 5_000))
    assert not np.all(np.diff(np.asarray(table.column("event_time").cast(pa.int64()))) > 0)
    assert data.requests(100, 50, 3, seed=1) == data.requests(100, 50, 3, seed=1)
    assert all(len(set(one["item_id"])) == 50 and len(one["user_id"]) == 1 for one in data.requests(100, 50, 3, seed=1))


def test_our_join_gives_every_row_and_what_bare_polars_finds_within_the_ttl(folder: Path) -> None:
    contestant = Contestant(folder)
    answer = contestant.handle({"do": "join", "folder": "join", "to": str(folder / "ours.parquet")})
    assert answer["rows"] == SIZES.spine
    frames = [frame(pq.read_table(folder / "join" / f"user_id{part}.parquet")) for part in ("", "_spine")]
    assert {"held", "bare"} == {do for do in ("held", "bare") if contestant.handle({"do": do, "folder": "join"})["seconds"] > 0}
    mine, bare = pl.read_parquet(folder / "ours.parquet"), bare_join(*frames).sort("row")
    present = mine["user_f0__status"] == ValueStatus.PRESENT
    assert 0 < present.sum() < SIZES.spine
    for name in data.names("user_id"):
        assert mine[name].filter(present).equals(bare[name].filter(present))
    rest = set(mine["user_f0__status"].filter(~present))
    assert rest == {ValueStatus.MISSING, ValueStatus.EXPIRED}


def test_a_request_takes_one_round_trip_for_each_entity_type(folder: Path) -> None:
    request = {"entities": SIZES.features // data.ROWS_PER_ENTITY, "items": 50, "count": 2, "seed": 0}
    with redis_server(folder) as port:
        stores = [{"name": "sqlite", "path": str(folder / "ours.db")}, {"name": "redis", "url": f"redis://127.0.0.1:{port}/0"}]
        for store, sent in zip(stores, (0, 2), strict=True):
            contestant = Contestant(folder)
            contestant.handle({"do": "materialize", "store": store})
            assert (
                len(contestant.handle({"do": "online", "requests": request})["ms"]) == 2
            )  # a client's first reading also makes a connection
            answer = contestant.handle({"do": "trips", "requests": request, "to": str(folder)})
            assert answer == {"trips": 2, "sent": sent, "entity_types": 2}
    newest = pl.read_parquet(folder / "online" / "item_id.parquet").sort("event_time").unique("item_id", keep="last")
    read = pl.read_parquet(folder / "item_id_ours.parquet").join(newest, on="item_id", how="left", maintain_order="left")
    assert read["item_f7"].equals(read["item_f7_right"], null_equal=True)


def test_other_values_are_found_and_named() -> None:
    ours = pa.table({"row": [0, 1, 2], "x": pa.array([1.0, None, 3.0])})
    assert same_values(ours, pa.table({"row": [2, 1], "x": [3.0, float("nan")]}), "row", ["x"]) == 2
    with pytest.raises(ValueError, match=r"column 'x': 1 values differ; at row=2 ours is 3\.0, theirs 4\.0"):
        same_values(ours, pa.table({"row": [0, 2], "x": [1.0, 4.0]}), "row", ["x"])
    with pytest.raises(ValueError, match="1 rows of theirs are none of ours"):
        same_values(ours, pa.table({"row": [7], "x": [1.0]}), "row", ["x"])


def test_memory_counts_what_was_there_only_for_a_while() -> None:
    def some() -> int:
        return int(np.ones(40 << 17)[::512].sum())  # 40 MiB

    assert 30 << 20 < peak_bytes(some) < 80 << 20


def test_the_checks_have_their_names_bounds_and_directions() -> None:
    steady = [1.0, 1.01, 0.99, 1.0, 1.02]
    joins = Joins(SIZES, {"asked": 500, "ours": 500, "file": 420, "duckdb": 500}, steady)
    joins.feast = {"file": [30 * x for x in steady], "duckdb": [20 * x for x in steady]}
    joins.ours_beside_bare, joins.bare = [1.5 * x for x in steady], steady
    joins.ours_bytes, joins.feast_bytes = [10 << 20] * 4 + [-5], {"file": [5 << 20] * 5, "duckdb": [100 << 20] * 5}
    online = [Online(name, {"trips": 2, "sent": 2, "entity_types": 2}, "apart", {}) for name in ("sqlite", "redis")]
    for one in online:
        one.ours, one.feast = [[1.0] * 98 + [4.0] * 2] * 5, [[10.0] * 100] * 5
    found = result([joins], online)
    checks = {check.name: check for check in found.checks}
    bounds = {name: (check.at_least, check.at_most) for name, check in checks.items()}
    assert bounds == {
        "join_over_feast": (12, None),
        "join_over_bare_polars": (None, 1.3),
        "rows_lost": (None, 0),
        "join_memory": (None, 0.5),
        **{f"{store}_{p}": (None, 0.25) for store in ("sqlite", "redis") for p in ("p50", "p99")},
    }
    assert {name for name, check in checks.items() if not check.holds} == {"join_over_bare_polars", "sqlite_p99", "redis_p99"}
    assert joins.kind == "duckdb" and checks["join_over_feast"].value == 20
    assert checks["join_over_feast"].note.startswith("duckdb: 20.00") and "file: 30.00" in checks["join_over_feast"].note
    assert "'file': 80" in checks["rows_lost"].note
    assert '"benchmark": "feature_store"' in found.json_line()
