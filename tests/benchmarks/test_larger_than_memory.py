# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a log larger than memory: its log is what it says, and a small one goes all the way."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import larger_than_memory
from benchmarks.larger_than_memory import data, stage
from benchmarks.larger_than_memory.data import Size


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Size:
    monkeypatch.setattr(data, "STEP", 5000)
    monkeypatch.setattr(data, "PLANTED", 100)
    return Size(rows=15_000, users=200, items=50, partitions=3)


def test_planted_rows_are_those_that_the_checks_expect(tmp_path: Path, small: Size) -> None:
    data.generate(tmp_path, small)
    table = pq.read_table(tmp_path / "events")
    assert table.num_rows == small.rows and len(list((tmp_path / "events").iterdir())) == 3
    assert table.column("uid").null_count == small.planted == 300
    assert table.column("iid").to_pylist().count("unknown") == 300
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert len(rows) - len(set(rows)) == 300
    counts = np.sort(np.unique(table.column("iid").to_pylist(), return_counts=True)[1])[::-1]
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.3), "the first item of Zipf's has ten times the events of the tenth"


def test_a_small_log_goes_all_the_way_and_no_row_is_lost(tmp_path: Path, small: Size) -> None:
    lines = {}
    for name in larger_than_memory.STAGES:
        found = getattr(stage, name)(tmp_path, small)()
        lines[name] = {**found, "stage": name, "seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 2**30, "disk_bytes": 1}
    result = larger_than_memory._result(lines, small)
    assert {check.name: check.value for check in result.checks} == {
        "larger_than_memory_peak_gib": 1.0,
        "rows_lost": 0,
        "planted_rows_miscounted": 0,
    }
    assert all(check.holds for check in result.checks) and json.loads(result.json_line())["rows"][3]["rows"] == "14,100"
    lines["loader"]["rows"] -= 1
    lines["ingest"]["peak_bytes"] = 5 * 2**30
    broken: dict[str, Any] = {check.name: check for check in larger_than_memory._result(lines, small).checks}
    assert broken["rows_lost"].value == 1 and not broken["rows_lost"].holds
    assert not broken["larger_than_memory_peak_gib"].holds


def test_a_stage_that_asks_for_more_than_the_limit_fails(tmp_path: Path) -> None:
    code = (
        "import numpy, sys; from benchmarks.larger_than_memory import stage\n"
        "stage.ingest = lambda folder, size: lambda: {'rows': len(numpy.ones(5 * 2**30, numpy.uint8))}\n"
        'stage.main([\'ingest\', sys.argv[1], \'{"rows": 1, "users": 1, "items": 1, "partitions": 1}\'])'
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=larger_than_memory.ROOT)
    assert done.returncode == 1 and "MemoryError" in done.stderr
