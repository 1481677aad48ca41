# SPDX-License-Identifier: Apache-2.0
"""A join in parts gives what the reader in memory gives: equal values, statuses and rows, in the order that is stated."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store.definitions import FeatureRepo
from feature_store.offline import OfflineReader
from feature_store.partitions import JoinConfig, JoinReport, join_features
from recsys.core.engine import Engine
from recsys.core.errors import ConfigError, DataError, SchemaError
from recsys.core.scatter import part_of
from recsys.core.status import ValueStatus

SERVICES = ("user", "item", "context")
TIME = pa.timestamp("us", tz="UTC")


def _repo(definitions: dict[str, Any]) -> FeatureRepo:
    """The world's definitions, and a service of the request."""
    request = {
        "name": "moment",
        "source": "request",
        "entity": "item_id",
        "features": [
            {"kind": "clock", "name": "hour", "unit": "hour"},
            {"kind": "attribute", "name": "shown_at", "column": "position", "type": "dense"},
            {"kind": "attribute", "name": "absent", "column": "absent_column", "type": "dense"},
        ],
    }
    return FeatureRepo.model_validate(
        {
            "sources": [*definitions["sources"], {"name": "request", "kind": "request"}],
            "views": [*definitions["views"], request],
            "services": [*definitions["services"], {"name": "context", "views": ["moment"]}],
        }
    )


def _spine(w: Any, count: int) -> pa.Table:
    """Users and items at times, with nulls, unknown ones and repetitions, and columns to keep."""
    spine = w.spine("user", count)
    items = w.rng.choices([*(f"i{i}" for i in range(9)), "nothing", None], k=spine.num_rows)
    position = [w.rng.choice([None, float("nan"), w.rng.random()]) for _ in range(spine.num_rows)]
    return spine.append_column("item_id", pa.array(items, pa.string())).append_column("position", pa.array(position, pa.float64()))


def _with_twins(w: Any, events: pa.Table) -> pa.Table:
    """Some events twice, the second time with other values: the first row counts."""
    rows = events.to_pylist()
    twins = [row | {"rating": 9.0, "channel": "twin"} for row in w.rng.sample(rows, len(rows) // 10)]
    return pa.Table.from_pylist(rows + twins, schema=events.schema)


def _write(folder: Path, tables: dict[str, pa.Table], files: int, row_group: int) -> dict[str, Path]:
    """Each table as a folder of so many files."""
    for name, table in tables.items():
        (folder / name).mkdir(parents=True)
        size = -(-table.num_rows // files)
        for number in range(files):
            pq.write_table(table.slice(number * size, size), folder / name / f"{number}.parquet", row_group_size=row_group)
    return {name: folder / name for name in tables}


def _expected(repo: FeatureRepo, tables: dict[str, pa.Table], spine: pa.Table, services: tuple[str, ...] = SERVICES) -> pa.Table:
    reader, result = OfflineReader(repo, tables), spine
    for service in services:
        read = reader.read(service, spine)
        for name in read.column_names[spine.num_columns :]:
            result = result.append_column(name, read.column(name))
    return result


def _equal(one: pa.Table, other: pa.Table) -> bool:
    """Whether columns, types and values are equal, NaN to NaN."""
    same = one.schema.equals(other.schema)
    return same and bool(pl.DataFrame(one).equals(pl.DataFrame(other)))


def _parts(out: Path) -> list[pa.Table]:
    return [pq.ParquetFile(path).read() for path in sorted(out.glob("part=*/rows.parquet"))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("order", ["partition", "spine"])
def test_a_join_in_parts_is_the_join_in_memory(world: Callable[..., Any], tmp_path: Path, seed: int, order: str) -> None:
    w = world(seed=seed, count=500)
    tables = w.tables | {"interactions": _with_twins(w, w.tables["interactions"])}
    spine = _spine(w, 400)
    repo = _repo(w.definitions)
    paths = _write(tmp_path / "in", tables | {"spine": spine}, files=3, row_group=37)
    parts = random.Random(seed).choice([1, 4, 7])
    config = JoinConfig(partitions=parts, order=order, chunk_rows=100, slice_rows=29, row_group=16)
    report = join_features(repo, paths, SERVICES, paths["spine"], tmp_path / "out", config)
    expected, found = _expected(repo, tables, spine), _parts(tmp_path / "out")
    assert report == JoinReport(spine.num_rows, parts) and len(found) == parts
    if order == "spine":
        assert _equal(pa.concat_tables(found), expected)
    else:
        place = part_of(spine.column("user_id"), parts)
        for part, table in enumerate(found):
            assert _equal(table, expected.filter(pa.array(place == part))), part
    statuses = np.concatenate([np.asarray(t.column(n)) for t in found for n in t.column_names if n.endswith("__status")])
    assert set(statuses) >= {ValueStatus.PRESENT, ValueStatus.NULL, ValueStatus.MISSING, ValueStatus.EXPIRED}
    assert max(pq.ParquetFile(path).metadata.row_group(0).num_rows for path in (tmp_path / "out").glob("*/*.parquet")) <= 16
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_neither_the_cut_nor_the_engine_changes_a_byte_of_the_result(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(seed=5)
    paths = _write(tmp_path / "in", w.tables | {"spine": _spine(w, 300)}, files=2, row_group=50)
    whole = JoinConfig(partitions=3)
    for name, config, engine in (
        ("whole", whole, Engine()),
        ("small", whole.model_copy(update={"chunk_rows": 64}), Engine()),
        ("processes", whole, Engine(workers=2)),
    ):
        join_features(_repo(w.definitions), paths, SERVICES, paths["spine"], tmp_path / name, config, engine=engine)
    contents = [[path.read_bytes() for path in sorted((tmp_path / name).glob("*/*.parquet"))] for name in ("whole", "small", "processes")]
    assert len(contents[0]) == 3 and contents[0] == contents[1] == contents[2]


@pytest.mark.slow
def test_ray_gives_the_same_files(world: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    w = world(seed=6)
    paths = _write(tmp_path / "in", w.tables | {"spine": _spine(w, 300)}, files=2, row_group=50)
    for name in ("local", "ray"):
        config = JoinConfig(partitions=4, chunk_rows=100)
        engine = Engine(name=name, workers=2)
        join_features(_repo(w.definitions), paths, SERVICES, paths["spine"], tmp_path / name, config, engine=engine)
    local, ray = ([path.read_bytes() for path in sorted((tmp_path / name).glob("*/*.parquet"))] for name in ("local", "ray"))
    assert len(local) == 4 and local == ray


def test_one_entity_type_and_no_rows(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(seed=7)
    spine = _spine(w, 50)
    spine = spine.append_column("row", pa.array(range(spine.num_rows)))
    for order in ("partition", "spine"):
        for name, asked in (("some", spine), ("none", spine.slice(0, 0))):
            paths = _write(tmp_path / order / name, w.tables | {"spine": asked}, files=1, row_group=50)
            config = JoinConfig(partitions=2, order=order)
            join_features(w.repo, paths, ("item",), paths["spine"], tmp_path / order / f"{name}_out", config)
            found = pa.concat_tables(_parts(tmp_path / order / f"{name}_out"))
            expected = _expected(w.repo, w.tables, asked, ("item",))
            assert found.num_rows == asked.num_rows and _equal(found.sort_by("row"), expected)


def test_late_times_can_be_ignored_as_in_memory(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(seed=8, late=0.8)
    spine = _spine(w, 200)
    paths = _write(tmp_path / "in", w.tables | {"spine": spine}, files=1, row_group=50)
    config = JoinConfig(partitions=1, ignore_available_time=True)
    join_features(w.repo, paths, ("user",), paths["spine"], tmp_path / "out", config)
    expected = OfflineReader(w.repo, w.tables, ignore_available_time=True).read("user", spine)
    assert _equal(_parts(tmp_path / "out")[0], expected)
    assert not _equal(expected, _expected(w.repo, w.tables, spine, ("user",)))


def test_keys_that_are_numbers_meet_keys_that_are_texts(tmp_path: Path) -> None:
    repo = FeatureRepo.model_validate(
        {
            "sources": [{"name": "e", "kind": "events", "table": "log", "keys": ["user_id"]}],
            "views": [{"name": "v", "source": "e", "entity": "user_id", "features": [{"kind": "count", "name": "n"}]}],
            "services": [{"name": "s", "views": ["v"]}],
        }
    )
    users, times = list(range(50)), pa.array([10**15] * 50, TIME)
    log = pa.table({"user_id": users, "event_time": times, "available_time": times, "ingest_seq": users})
    spine = pa.table({"user_id": pa.array(users).cast(pa.string()).dictionary_encode(), "request_time": times})
    paths = _write(tmp_path / "in", {"log": log, "spine": spine}, files=1, row_group=50)
    join_features(repo, paths, ("s",), paths["spine"], tmp_path / "out", JoinConfig(partitions=4))
    assert pa.concat_tables(_parts(tmp_path / "out")).column("n").to_pylist() == [1] * 50


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"services": ("user", "nobody")}, ConfigError, "unknown feature service 'nobody'"),
        ({"services": ("user", "user")}, ConfigError, "view 'profile' is read by several of user, user"),
        ({"services": ()}, ConfigError, "expected at least one feature service"),
        ({"tables": {}}, DataError, "feature services user: unknown table 'interactions'"),
        ({"spine": {"request_time": "when"}}, SchemaError, "spine: missing column: unknown column 'request_time'"),
        ({"spine": {"label": "age"}}, SchemaError, "spine: column 'age' has the name of a feature"),
        ({"spine": {"label": "item_rating"}}, SchemaError, "spine: column 'item_rating' has the name of a feature"),
        ({"spine": {"label": "__row"}}, SchemaError, "spine: column '__row': the name is needed"),
        ({"log": {"rating": "stars"}}, SchemaError, "table 'interactions' of view 'activity': missing column: unknown column 'rating'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_read(
    world: Callable[..., Any], tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    w = world(seed=1)
    spine = _spine(w, 20)
    spine = spine.rename_columns([change.get("spine", {}).get(name, name) for name in spine.column_names])
    log = w.tables["interactions"]
    log = log.rename_columns([change.get("log", {}).get(name, name) for name in log.column_names])
    paths = _write(tmp_path / "in", w.tables | {"interactions": log, "spine": spine}, files=1, row_group=50)
    tables = {"users": paths["users"]} if "tables" in change else paths
    with pytest.raises(error, match=message):
        join_features(w.repo, tables, change.get("services", ("user", "item")), paths["spine"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_rule_of_a_source_that_is_broken_is_told_as_in_memory(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(seed=2)
    twice = pa.concat_tables([w.tables["users"], w.tables["users"].slice(0, 1)])
    paths = _write(tmp_path / "in", w.tables | {"users": twice, "spine": _spine(w, 20)}, files=2, row_group=50)
    for engine in (Engine(), Engine(workers=2)):
        with pytest.raises(DataError, match="table 'users' of view 'profile': expected one row for each user_id, but 'u9' has several"):
            join_features(w.repo, paths, ("user",), paths["spine"], tmp_path / "out", JoinConfig(partitions=2), engine=engine)
    paths["interactions"] = tmp_path / "nowhere"
    with pytest.raises(DataError, match="nowhere: no such file"):
        join_features(w.repo, paths, ("user",), paths["spine"], tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out exists already"):
        join_features(w.repo, paths, ("user",), paths["spine"], tmp_path / "out")


# Runs until so many tasks are done, says so, and waits for its end.
CHILD = """
import sys
from pathlib import Path
from feature_store.definitions import FeatureRepo
from feature_store.partitions import JoinConfig, join_features

folder, stop, order = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
calls = 0

def progress(what, done, total):
    global calls
    calls += 1
    if calls == stop:
        print("stopped", flush=True)
        sys.stdin.read()

repo = FeatureRepo.model_validate_json((folder / "repo.json").read_text())
tables = {name: folder / "in" / name for name in ("interactions", "users")}
config = JoinConfig(partitions=3, order=order, chunk_rows=100)
join_features(repo, tables, ("user", "item"), folder / "in" / "spine", folder / "out", config, progress=progress)
"""


@pytest.mark.parametrize(("stop", "order"), [(2, "partition"), (10, "partition"), (17, "partition"), (18, "spine"), (22, "spine")])
def test_a_join_that_was_killed_is_gone_on_with(world: Callable[..., Any], tmp_path: Path, stop: int, order: str) -> None:
    w = world(seed=9)
    paths = _write(tmp_path / "in", w.tables | {"spine": _spine(w, 300)}, files=2, row_group=50)
    (tmp_path / "repo.json").write_text(w.repo.model_dump_json())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(stop), order]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "stopped\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    config = JoinConfig(partitions=3, order=order, chunk_rows=100)
    done: dict[str, list[str]] = {"out": [], "anew": []}
    for name, calls in done.items():
        join_features(
            w.repo, paths, ("user", "item"), paths["spine"], tmp_path / name, config, progress=lambda what, *_, c=calls: c.append(what)
        )
    assert len(done["out"]) == len(done["anew"]) - stop
    again, anew = ([path.read_bytes() for path in sorted((tmp_path / name).glob("*/*"))] for name in done)
    assert len(again) == 3 and again == anew and not (tmp_path / ".out.work").exists()


def test_a_source_that_has_changed_begins_anew(world: Callable[..., Any], tmp_path: Path) -> None:
    w = world(seed=9)
    spine = _spine(w, 300)
    paths = _write(tmp_path / "in", w.tables | {"spine": spine}, files=1, row_group=50)

    def fail(what: str, *_: int) -> None:
        if what == "write the result":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        join_features(w.repo, paths, ("user",), paths["spine"], tmp_path / "out", JoinConfig(partitions=2), progress=fail)
    pq.write_table(spine.slice(100), paths["spine"] / "0.parquet")
    assert join_features(w.repo, paths, ("user",), paths["spine"], tmp_path / "out", JoinConfig(partitions=2)).rows == spine.num_rows - 100
    assert sum(table.num_rows for table in _parts(tmp_path / "out")) == spine.num_rows - 100


# Writes so many events of a table, joins them with themselves in as many parts as keep a part's size, and prints the peak of its memory.
MEASURED = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from feature_store.definitions import FeatureRepo
from feature_store.partitions import JoinConfig, join_features

folder, rows = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir()
rng, step = np.random.default_rng(0), 50_000
time = pa.timestamp("us", tz="UTC")
writer = None
for first in range(0, rows, step):
    times = pa.array(np.sort(rng.integers(0, 10**12, step)), time)
    ids = {"user_id": rng.integers(0, rows // 10, step).astype(str), "item_id": rng.integers(0, rows // 10, step).astype(str)}
    place = np.arange(first, first + step)
    table = pa.table(ids | {"event_time": times, "available_time": times, "request_time": times, "ingest_seq": place})
    writer = writer or pq.ParquetWriter(folder / "log.parquet", table.schema)
    writer.write_table(table)
writer.close()
repo = FeatureRepo.model_validate_json((folder.parent / "repo.json").read_text())
config = JoinConfig(partitions=rows // 50_000, chunk_rows=step, slice_rows=20_000)
join_features(repo, {"log": folder / "log.parquet"}, ("user", "item"), folder / "log.parquet", folder / "out", config)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    features = [{"kind": "count", "name": "{}_n"}, {"kind": "last_n", "name": "{}_last", "column": "{}", "n": 20}]
    views = [
        {
            "name": key,
            "source": "log",
            "entity": f"{key}_id",
            "features": [
                {name: value.format(other) if isinstance(value, str) else value for name, value in feature.items()}
                | {"name": feature["name"].format(key)}
                for feature in features
            ],
        }
        for key, other in (("user", "item_id"), ("item", "user_id"))
    ]
    source = {"name": "log", "kind": "events", "table": "log", "keys": ["user_id", "item_id"]}
    services = [{"name": key, "views": [key]} for key in ("user", "item")]
    repo = FeatureRepo.model_validate({"sources": [source], "views": views, "services": services})
    (tmp_path / "repo.json").write_text(repo.model_dump_json())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "ARROW_DEFAULT_MEMORY_POOL": "system"}
    peaks = []
    for name, rows in (("small", 200_000), ("large", 2_000_000)):
        command = [sys.executable, "-c", MEASURED, str(tmp_path / name), str(rows)]
        peaks.append(int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout))
        table_bytes = sum(path.stat().st_size for path in (tmp_path / name / "out").rglob("*.parquet"))
    assert peaks[1] - peaks[0] < 100 * 2**20 < table_bytes, [f"{peak / 2**20:.0f} MiB" for peak in (*peaks, table_bytes)]
