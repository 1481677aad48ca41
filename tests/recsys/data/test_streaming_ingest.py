# SPDX-License-Identifier: Apache-2.0
"""Ingest in parts gives what ingest in memory gives: rows, counts, examples and errors."""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.core.engine import Engine
from recsys.core.errors import DataError, SchemaError
from recsys.core.scatter import part_of
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.ingest import ingest, ingest_partitioned, read_dataset

NOW = datetime(2024, 1, 1, tzinfo=UTC)
SCHEMA: dict[str, Any] = {
    "interactions": {
        "user_id": "uid",
        "item_id": "iid",
        "event_time": {"column": "ts", "unit": "s"},
        "available_time": {"column": "seen", "unit": "s"},
        "values": [
            {"name": "rating", "kind": "label", "source": "stars"},
            {"name": "price", "kind": "dense"},
            {"name": "tags", "kind": "sequence"},
        ],
    },
    "items": {"item_id": "iid", "attributes": [{"name": "title", "kind": "text"}]},
    "users": {"user_id": "uid", "attributes": [{"name": "age", "kind": "dense", "dtype": "int"}]},
}


def schema(**changes: Any) -> DatasetSchema:
    return DatasetSchema.model_validate({**SCHEMA, **changes})


def dirty_events(seed: int, count: int) -> pa.Table:
    """Everything that a rule looks for: nulls, repetitions, the future, unknown items, numbers that are not finite."""
    rng = np.random.default_rng(seed)

    def some(values: list[Any]) -> list[Any]:
        return [values[i] for i in rng.integers(len(values), size=count)]

    columns = {
        "uid": pa.array(some([*map(str, range(20)), "", None]), pa.string()),
        "iid": pa.array(some([*"abcdef", "x", "y", None]), pa.string()),
        "ts": pa.array(some([1, 2, 3, 10**11, None, float("nan")]), pa.float64()),
        "seen": pa.array(some([None, 4, 2]), pa.int64()),
        "stars": pa.array(some([1.0, 2.0]), pa.float64()),
        "price": pa.array(some([1.0] * 20 + [float("inf")]) if seed % 2 else [1.0] * count, pa.float64()),
        "tags": pa.array(some([["a"], [], None]), pa.list_(pa.string())),
    }
    columns["stars"] = pa.array([float("inf") if row == count - 3 else value.as_py() for row, value in enumerate(columns["stars"])])
    return pa.table(columns)


def write(folder: Path, events: pa.Table, files: int = 3) -> tuple[Path, Path, Path]:
    """The events as a folder of files, and items and users."""
    (folder / "events").mkdir(parents=True)
    size = -(-events.num_rows // files)
    for number in range(files):
        pq.write_table(events.slice(number * size, size), folder / "events" / f"{number}.parquet", row_group_size=19)
    pq.write_table(pa.table({"iid": [*"abcdefa", None], "title": [*"ABCDEFA", None]}), folder / "items.parquet")
    pq.write_table(pa.table({"uid": ["1", "2", "2"], "age": [30, None, None]}), folder / "users.parquet")
    return folder / "events", folder / "items.parquet", folder / "users.parquet"


@pytest.mark.parametrize("rule", ["drop", "add"])
@pytest.mark.parametrize("seed", range(4))
def test_ingest_in_parts_is_ingest_in_memory(tmp_path: Path, seed: int, rule: str) -> None:
    sources = write(tmp_path / "raw", dirty_events(seed, 600))
    chosen = schema(on_unknown_item=rule)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = ingest(*sources, chosen, tmp_path / "whole" / "shop", now=NOW)
    manifest = ingest_partitioned(*sources, chosen, tmp_path / "parts" / "shop", partitions=5, chunk_rows=50, now=NOW)
    parts = read_dataset(tmp_path / "parts" / "shop")
    assert manifest.report == whole.report == parts.report
    assert all(whole.report.count("interactions", rule) for rule in ("null_user", "exact_duplicate", "future_time", "non_finite"))
    assert parts == whole and parts.fingerprint() == whole.fingerprint()
    assert manifest.partitions is not None and sum(manifest.partitions.rows) == whole.interactions.num_rows


def test_a_part_holds_its_users_in_the_order_of_time(tmp_path: Path) -> None:
    sources = write(tmp_path, dirty_events(0, 600))
    manifest = ingest_partitioned(*sources, schema(), tmp_path / "shop", partitions=4, now=NOW)
    files = sorted((tmp_path / "shop" / "interactions").glob("part=*/*.parquet"))
    assert [file.parent.name for file in files] == [f"part={part:04d}" for part in range(4)]
    for part, file in enumerate(files):
        table = pq.ParquetFile(file).read()
        assert table.schema.equals(schema().interactions.features.to_arrow())
        assert manifest.partitions is not None and table.num_rows == manifest.partitions.rows[part] > 0
        assert (part_of(table.column("user_id"), 4) == part).all()
        order = np.lexsort((table["ingest_seq"].to_numpy(), table["event_time"].cast(pa.int64()).to_numpy()))
        assert (order == np.arange(table.num_rows)).all()


def test_neither_chunks_nor_processes_change_a_byte(tmp_path: Path) -> None:
    sources = write(tmp_path / "raw", dirty_events(1, 600))
    contents = []
    for name, chunk_rows, engine in (("one", 10**6, Engine()), ("many", 40, Engine()), ("processes", 100, Engine(workers=2))):
        (tmp_path / name).mkdir()
        ingest_partitioned(*sources, schema(), tmp_path / name / "shop", partitions=3, chunk_rows=chunk_rows, engine=engine, now=NOW)
        contents.append({path.name: path.read_bytes() for path in sorted((tmp_path / name).rglob("*")) if path.is_file()})
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.slow
def test_ray_gives_the_same_files(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    sources = write(tmp_path / "raw", dirty_events(1, 600))
    contents = []
    for name in ("local", "ray"):
        (tmp_path / name).mkdir()
        ingest_partitioned(
            *sources, schema(), tmp_path / name / "shop", partitions=3, chunk_rows=100, engine=Engine(name=name, workers=2), now=NOW
        )
        contents.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")})
    assert len(contents[0]) == 7 and contents[0] == contents[1]


@pytest.mark.parametrize(
    ("events", "rule", "error"),
    [
        ({"stars": ["1", "2", "3", "four", "5"]}, "drop", SchemaError),
        ({"iid": ["a", "b", "a", "a", "zz"]}, "error", DataError),
        ({"uid": [None] * 5}, "drop", DataError),
    ],
)
def test_an_error_is_that_of_ingest_in_memory(tmp_path: Path, events: dict[str, Any], rule: str, error: type[Exception]) -> None:
    plain = {"uid": list("12345"), "iid": list("abcde"), "ts": range(5), "seen": range(5), "stars": range(5), "price": range(5)}
    table = pa.table({name: pa.array(values) for name, values in ({**plain, "tags": [["a"]] * 5} | events).items()})
    sources = write(tmp_path, table)
    with pytest.raises(error) as whole:
        ingest(*sources, schema(on_unknown_item=rule), tmp_path / "shop", now=NOW)
    for engine in (Engine(), Engine(workers=2)):
        with pytest.raises(error) as parts:
            ingest_partitioned(
                *sources, schema(on_unknown_item=rule), tmp_path / "shop", partitions=2, chunk_rows=2, engine=engine, now=NOW
            )
        assert str(parts.value) == str(whole.value)
    assert not (tmp_path / "shop").exists()


def test_a_source_must_be_parquet_and_have_its_columns(tmp_path: Path) -> None:
    events, items, users = write(tmp_path, dirty_events(0, 60))
    (tmp_path / "events.csv").write_text("uid,iid\n1,a\n")
    with pytest.raises(DataError, match=r"events.csv: cannot be read"):
        ingest_partitioned(tmp_path / "events.csv", items, users, schema(), tmp_path / "shop", partitions=2)
    with pytest.raises(DataError, match=r"shop: users: the schema has them, but no source is given"):
        ingest_partitioned(events, items, None, schema(), tmp_path / "shop", partitions=2)
    wanted = schema(interactions={**SCHEMA["interactions"], "user_id": "user"})
    with pytest.raises(SchemaError, match=r"interactions.user_id: unknown column 'user'"):
        ingest_partitioned(events, items, users, wanted, tmp_path / "shop", partitions=2)


def test_what_was_changed_is_told_and_what_exists_is_kept(tmp_path: Path) -> None:
    sources = write(tmp_path, dirty_events(0, 600))
    ingest_partitioned(*sources, schema(), tmp_path / "shop", partitions=2, now=NOW)
    with pytest.raises(DataError, match="shop exists already"):
        ingest_partitioned(*sources, schema(), tmp_path / "shop", partitions=2, now=NOW)
    file = tmp_path / "shop" / "interactions" / "part=0001" / "events.parquet"
    table = pq.ParquetFile(file).read()
    pq.write_table(table.slice(1), file)
    with pytest.raises(DataError, match="they were changed"):
        read_dataset(tmp_path / "shop")
    ingest_partitioned(*sources, schema(), tmp_path / "shop", partitions=2, now=NOW, overwrite=True)
    assert read_dataset(tmp_path / "shop").interactions.num_rows > table.num_rows


# Runs until so many tasks are done, says so, and waits for its end.
CHILD = """
import sys
from pathlib import Path
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.ingest import ingest_partitioned

folder, stop = Path(sys.argv[1]), int(sys.argv[2])
calls = 0

def progress(what, done, total):
    global calls
    calls += 1
    if calls == stop:
        print("stopped", flush=True)
        sys.stdin.read()

schema = DatasetSchema.load(folder / "schema.yaml")
sources = (folder / "events", folder / "items.parquet", folder / "users.parquet")
ingest_partitioned(*sources, schema, folder / "shop", partitions=4, chunk_rows=60, progress=progress)
"""


@pytest.mark.parametrize("stop", [1, 5, 14, 16])
def test_a_run_that_was_killed_is_gone_on_with(tmp_path: Path, stop: int) -> None:
    sources = write(tmp_path, dirty_events(2, 600))
    (tmp_path / "schema.yaml").write_text(schema().dump())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(stop)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "stopped\n"
        with pytest.raises(DataError, match="another run is making it at this moment"):
            ingest_partitioned(*sources, schema(), tmp_path / "shop", partitions=4, chunk_rows=60)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "shop").exists()
    left = tmp_path / ".shop.work" / "scattered" / ".000099.parquet.1.tmp"
    left.write_bytes(b"half of a file")
    done: list[tuple[str, int, int]] = []
    ingest_partitioned(*sources, schema(), tmp_path / "shop", partitions=4, chunk_rows=60, progress=lambda *call: done.append(call))
    assert len(done) == 3 * 4 + 4 - stop  # three files of four chunks, and four parts
    (tmp_path / "anew").mkdir()
    ingest_partitioned(*sources, schema(), tmp_path / "anew" / "shop", partitions=4, chunk_rows=60)
    again, anew = (
        {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}
        for base in (tmp_path / "shop", tmp_path / "anew" / "shop")
    )
    assert len(again) == 4 + 4 and again == anew
    assert not (tmp_path / ".shop.work").exists()
