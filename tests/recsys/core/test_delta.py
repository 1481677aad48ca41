# SPDX-License-Identifier: Apache-2.0
"""Real Delta tables: versions that stay what they are, appends that happen once, and writers that die or meet."""

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from recsys.core import delta
from recsys.core.delta import DeltaVersion, append_events, pinned
from recsys.core.errors import ConfigError, DataError, SchemaError
from recsys.core.scatter import chunks, parquet_files
from recsys.core.schema import TIME

COLUMNS = ["user_id", "event_time", "available_time", "ingest_seq", "tags"]


def events(count: int, seed: int = 0, first_day: int = 0) -> pa.Table:
    """Events of three days, whose ``ingest_seq`` counts from 0."""
    rng = random.Random(seed)
    times = [(first_day * 86_400 + rng.randrange(3 * 86_400)) * 1_000_000 + rng.randrange(1_000_000) for _ in range(count)]
    columns = {
        "user_id": pa.array([rng.choice(["a", "ü", "c"]) for _ in range(count)], pa.string()),
        "event_time": pa.array(times, pa.int64()).cast(TIME),
        "available_time": pa.array([at + rng.choice([0, 10**6]) for at in times], pa.int64()).cast(TIME),
        "ingest_seq": pa.array(range(count), pa.int64()),
        "tags": pa.array([rng.choice([["x", None], [], None]) for _ in range(count)], pa.list_(pa.string())),
    }
    return pa.table(columns)


def content(version: DeltaVersion) -> pa.Table:
    return version.read(COLUMNS).sort_by("ingest_seq").combine_chunks()


def raised(table: pa.Table, by: int) -> pa.Table:
    return table.set_column(3, "ingest_seq", pc.add(table.column("ingest_seq"), by))


@pytest.mark.parametrize("by_day", [False, True])
def test_a_version_stays_what_it_is(tmp_path: Path, by_day: bool) -> None:
    table, one, two = tmp_path / "log", events(50), events(30, 1)
    first = DeltaVersion(table, append_events(table, one, app="a", number=1, by_day=by_day).version)
    before = content(first)
    assert before.equals(one.cast(before.schema))
    second = append_events(table, two, app="a", number=2)
    deltalake.DeltaTable(str(table)).optimize.compact()
    assert content(first).equals(before)
    both = pa.concat_tables([one, raised(two, 50)]).cast(before.schema).combine_chunks()
    assert content(DeltaVersion(table, second.version)).equals(both) and second.added == 30
    latest = DeltaVersion.open(table)
    assert latest.version > second.version and content(latest).equals(both)
    assert latest.last_ingest_seq() == 79 and first.last_ingest_seq() == 49
    assert pa.concat_tables([pq.ParquetFile(file).read(COLUMNS) for file in latest.files()]).num_rows == 80
    assert len([folder for folder in table.iterdir() if folder.name.startswith("event_day=")]) == (3 if by_day else 0)


def test_a_repeated_append_adds_nothing(tmp_path: Path) -> None:
    table = tmp_path / "log"
    assert append_events(table, events(20), app="a", number=4).added == 20
    after = DeltaVersion.open(table)
    for number in (4, 3):
        again = append_events(table, events(20), app="a", number=number)
        assert (again.added, again.version) == (0, after.version)
    assert append_events(table, events(20), app="b", number=1).added == 20
    assert append_events(table, events(20), app="a", number=5).added == 20
    assert content(DeltaVersion.open(table)).column("ingest_seq").to_pylist() == list(range(60))


def test_only_files_above_the_watermark_are_read(tmp_path: Path) -> None:
    table = tmp_path / "log"
    for number in range(4):
        append_events(table, events(25, number), app="a", number=number)
    latest = DeltaVersion.open(table)
    assert [len(latest.files(above)) for above in (None, -1, 24, 60, 74, 99)] == [4, 4, 3, 2, 1, 0]
    for above in (-1, 24, 60, 99):
        expected = content(latest).filter(pc.greater(content(latest).column("ingest_seq"), above))
        assert latest.read(COLUMNS, above=above).sort_by("ingest_seq").equals(expected)
    kept = set(latest.files(60))
    for file in set(latest.files()) - kept:
        Path(file).unlink()
    assert latest.read(["ingest_seq"], above=60).num_rows == 39  # what is gone is not asked for


def test_writers_that_meet_stand_one_after_another(tmp_path: Path) -> None:
    table = tmp_path / "log"
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda n: _append_until_done(table, events(10, n), f"writer {n}"), range(8)))
    assert sorted(done) == [10] * 8
    latest = content(DeltaVersion.open(table))
    assert latest.column("ingest_seq").to_pylist() == list(range(80))
    for n in range(8):  # the rows of an append keep their order and follow each other
        mine = events(10, n).column("event_time").to_pylist()
        assert any(latest.column("event_time").slice(first, 10).to_pylist() == mine for first in range(0, 80, 10))


def _append_until_done(table: Path, rows: pa.Table, app: str) -> int:
    while True:
        try:
            return append_events(table, rows, app=app, number=1).added
        except DataError as error:
            assert "other writers committed first" in str(error)


def test_the_same_append_by_two_writers_is_there_once(tmp_path: Path) -> None:
    table = tmp_path / "log"
    with ThreadPoolExecutor(4) as pool:
        added = list(pool.map(lambda _: _append_until_done(table, events(10), "the same"), range(4)))
    assert sorted(added) == [0, 0, 0, 10]
    assert DeltaVersion.open(table).read(["ingest_seq"]).num_rows == 10


def test_a_writer_that_always_comes_second_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, commit, others = tmp_path / "log", delta._commit, []

    def second(loaded: Any, rows: pa.Table, app: str, number: int, note: Any) -> None:
        others.append(app)
        if app == "slow":
            append_events(table, events(5), app=f"other {len(others)}", number=1)
        commit(loaded, rows, app, number, note)

    monkeypatch.setattr(delta, "_commit", second)
    with pytest.raises(DataError, match="log: other writers committed first, 5 times; nothing was added: append again"):
        append_events(table, events(7), app="slow", number=1)
    assert DeltaVersion.open(table).read(["ingest_seq"]).num_rows == 5 * 5
    monkeypatch.setattr(delta, "_commit", commit)
    assert append_events(table, events(7), app="slow", number=1).added == 7


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from recsys.core.delta import append_events
from tests.recsys.core.test_delta import events
for number in range(int(sys.argv[2])):
    append_events(Path(sys.argv[1]), events(40, number), app="stream", number=number)
    print(number, flush=True)
"""
APPENDS = 12


def _writer(table: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    root = str(Path(__file__).parents[3])
    command = [sys.executable, "-c", WRITER, str(table), str(APPENDS), root]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("seed", range(3))
def test_killed_between_appends_no_row_is_lost_or_doubled(tmp_path: Path, seed: int) -> None:
    table, rng = tmp_path / "log", random.Random(seed)
    for after in (2, 6):  # two runs die, wherever they are some moments after an append
        with _writer(table) as process:
            assert process.stdout is not None
            assert any(line.strip() == str(after) for line in iter(process.stdout.readline, ""))
            time.sleep(rng.random() * 0.03)
            process.send_signal(signal.SIGKILL)
            assert process.wait(30) == -signal.SIGKILL
    with _writer(table) as process:
        assert process.wait(60) == 0
    whole = content(DeltaVersion.open(table))
    expected = pa.concat_tables([raised(events(40, number), 40 * number) for number in range(APPENDS)])
    assert whole.equals(expected.cast(whole.schema).combine_chunks())


def test_paths_that_name_a_version(tmp_path: Path) -> None:
    table = tmp_path / "log"
    version = append_events(table, events(30), app="a", number=1).version
    append_events(table, events(30), app="a", number=2)
    assert pinned(tmp_path / f"log@v{version}") == DeltaVersion(table, version)
    assert pinned(tmp_path) is None and pinned(tmp_path / "other.parquet") is None
    assert parquet_files(tmp_path / f"log@v{version}") == DeltaVersion(table, version).files()
    assert sum(chunk.rows for chunk in chunks(tmp_path / f"log@v{version}", 7)) == 30
    with pytest.raises(DataError, match=rf"log is a Delta table: say which version, such as .*log@v{version + 1}"):
        parquet_files(table)
    with pytest.raises(DataError, match="version 99 cannot be read"):
        parquet_files(tmp_path / "log@v99")
    with pytest.raises(DataError, match="none is not a Delta table: it has no _delta_log"):
        parquet_files(tmp_path / "none@v1")


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "log"
    append_events(table, events(5), app="a", number=1)
    with pytest.raises(SchemaError, match=r"log: expected the columns user_id string, .*; got user_id string, .*ingest_seq int64$"):
        append_events(table, events(5).drop_columns(["tags"]), app="a", number=2)
    with pytest.raises(SchemaError, match="events: missing column: unknown column 'ingest_seq'"):
        append_events(table, events(5).drop_columns(["ingest_seq"]), app="a", number=2)
    nulls = events(5).set_column(1, "event_time", pa.nulls(5, TIME))
    with pytest.raises(DataError, match="expected a value of 'event_time' in every row, but 5 are null"):
        append_events(table, nulls, app="a", number=2)
    with pytest.raises(SchemaError, match=r"@v\d+: missing column: unknown column 'rating'"):
        DeltaVersion.open(table).read(["rating"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(DataError, match="other exists already and is not a Delta table"):
        append_events(tmp_path / "other", events(5), app="a", number=1)
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(ConfigError, match=r"install it with pip install 'recsys-scaling\[delta\]'"):
        DeltaVersion.open(table)
