# SPDX-License-Identifier: Apache-2.0
"""Parts that lose rows later; the writer itself is tested by the logs that use it."""

import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.core.errors import DataError
from recsys.core.part_log import drop_rows, part_files, remove_leftovers


def test_rows_go_and_all_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "part-1.parquet"
    table = pa.table({"n": [1, 2, 3, 4], "text": ["a", None, "c", "d"]}).replace_schema_metadata({b"format": b"7"})
    pq.write_table(table, path)
    assert drop_rows(path, lambda part: np.asarray(part.column("n")) % 2 == 0) == 2
    found = pq.read_table(path)
    assert found.equals(table.take([0, 2])) and found.schema.metadata[b"format"] == b"7"
    before = path.stat().st_mtime_ns
    assert drop_rows(path, lambda part: np.zeros(part.num_rows, bool)) == 0 and path.stat().st_mtime_ns == before
    assert drop_rows(path, lambda part: np.ones(part.num_rows, bool)) == 2 and pq.read_table(path).num_rows == 0
    assert [each.name for each in tmp_path.iterdir()] == ["part-1.parquet"]
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"part-1\.parquet: not a whole Parquet file"):
        drop_rows(path, lambda part: np.zeros(part.num_rows, bool))


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    for name in (".part-1.parquet.7.tmp", ".part-2.parquet.8.tmp", "part-3.parquet", ".hidden.parquet"):
        (tmp_path / name).write_bytes(b"x")
    old = time.time() - 3600
    os.utime(tmp_path / ".part-1.parquet.7.tmp", (old, old))
    assert remove_leftovers(tmp_path) == 1 and remove_leftovers(tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden.parquet", ".part-2.parquet.8.tmp", "part-3.parquet"]
    assert [path.name for path in part_files(tmp_path)] == ["part-3.parquet"]
