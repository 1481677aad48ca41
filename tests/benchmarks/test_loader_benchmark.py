# SPDX-License-Identifier: Apache-2.0
"""The loader's benchmark without the peers: its data, our side of it, the comparison of sums, and the checks of made-up measurements."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import peers
from benchmarks.loader import data, rounds
from benchmarks.loader.data import CATEGORICAL, DENSE, FIRST, LABEL, LIST, PLACES, TAGS
from benchmarks.loader.ours import SPEC, contestant
from benchmarks.loader.report import Memory, Speeds, result
from benchmarks.loader.rounds import Entry, check_same, compete, memory
from recsys.data.encoded import EncodedColumns, write_rows

ROWS = 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 200 rows in row groups of 60."""
    place = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "FILE_ROWS", 200)
        patch.setattr(data, "GROUP_ROWS", 60)
        data.write(place, ROWS, data.Source(40))
    return place


def read(folder: Path, kind: str) -> pa.Table:
    return pq.read_table(folder / kind).combine_chunks()


def test_rows_are_the_same_in_every_kind(folder: Path) -> None:
    raw, encoded, padded, flat = (read(folder, kind) for kind in data.KINDS)
    assert raw.num_rows == encoded.num_rows == padded.num_rows == flat.num_rows == ROWS
    for name in CATEGORICAL:
        pairs = Counter(zip(raw[name].to_pylist(), encoded[name].to_pylist(), strict=True))
        strings, ids = {string for string, _ in pairs}, {number for _, number in pairs}
        assert len(pairs) == len(strings) == len(ids) and (None, 0) in pairs and min(ids - {0}) >= FIRST
    for name in DENSE:
        assert raw[name].null_count > 0 and raw[name].fill_null(0).equals(encoded[name])
    lists = encoded[TAGS].to_pylist()
    assert {len(ids) for ids in lists} == set(range(1, LIST + 1)) == {len(words) for words in raw[TAGS].to_pylist()}
    assert padded[TAGS].to_pylist() == [ids + [0] * (LIST - len(ids)) for ids in lists]
    assert [list(row) for row in zip(*(flat[name].to_pylist() for name in PLACES), strict=True)] == padded[TAGS].to_pylist()
    assert raw[LABEL].equals(flat[LABEL]) and 0 < np.mean(raw[LABEL].to_numpy()) < 0.5


def test_encoded_files_are_as_the_library_writes_them(folder: Path, tmp_path: Path) -> None:
    table, path = read(folder, "encoded"), tmp_path / "ours.parquet"
    write_rows(path, SPEC, [EncodedColumns(SPEC).transform(table)], lists={TAGS})
    ours, theirs = pq.read_metadata(path), pq.read_metadata(data.files(folder / "encoded")[0])
    schema = theirs.schema.to_arrow_schema()
    assert {f.name: f for f in ours.schema.to_arrow_schema()} == {f.name: f for f in schema}
    for group in (ours.row_group(0), theirs.row_group(0)):
        columns = [group.column(i) for i in range(group.num_columns)]
        assert {column.compression for column in columns} == {"LZ4"}
        assert all("BYTE_STREAM_SPLIT" in column.encodings for column in columns)
    assert pq.read_table(path).select(table.column_names).equals(table)


def test_every_way_of_ours_gives_every_row_once(folder: Path, tmp_path: Path) -> None:
    ours, raw = contestant(tmp_path), read(folder, "raw")
    ours.handle({"do": "prepare", "folder": str(folder)})
    found = {way: ours.handle({"do": "sums", "way": way, "folder": str(folder)}) for way in ("encoded", "raw")}
    for way in ("encoded_in_order", "encoded_ahead", "raw_ahead"):
        base = way.split("_")[0]
        check_same(way, ours.handle({"do": "sums", "way": way, "folder": str(folder)}), found[base], raw=False)
    check_same("raw", found["raw"], found["encoded"], raw=True)
    assert found["raw"]["rows"] == ROWS and found["raw"]["labels"] == sum(raw[LABEL].to_pylist())
    np.testing.assert_allclose(
        found["raw"]["dense"], [np.nansum(raw[name].fill_null(0).to_numpy(), dtype=float) for name in DENSE], rtol=1e-5
    )
    timed = ours.handle({"do": "time", "way": "encoded", "folder": str(folder)})
    assert timed["rows"] == ROWS and timed["seconds"] > 0
    assert ours.handle({"do": "time", "way": "encoded", "folder": str(folder), "batches": 0})["rows"] == 0
    assert ours.handle({"do": "memory", "way": "raw", "folder": str(folder)})["bytes"] >= 0


def test_other_numbers_are_named(folder: Path, tmp_path: Path) -> None:
    expected = contestant(tmp_path).handle({"do": "sums", "way": "encoded", "folder": str(folder)})

    def wrong(**changes: Any) -> str:
        with pytest.raises(ValueError, match="peer gives other numbers than ours over an epoch: ") as raised:
            check_same("peer", expected | changes, expected, raw=False)
        return str(raised.value).split(": ")[1]

    check_same("peer", dict(expected), expected, raw=False)
    assert wrong(rows=ROWS - 1) == "rows"
    assert wrong(labels=expected["labels"] + 1, dense=[x + 0.1 for x in expected["dense"]]) == "labels, dense"
    assert wrong(ids=expected["ids"] | {"c3": "x", TAGS: "y"}) == f"c3, {TAGS}"
    with pytest.raises(ValueError, match="c3"):
        check_same("peer", expected | {"frequencies": expected["frequencies"] | {"c3": "x"}}, expected, raw=True)
    check_same("peer", expected | {"ids": {}}, expected, raw=True)


def test_without_a_peer_the_benchmark_says_how_to_build_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="the environment of rechub is not there; build it with: make peers"):
        compete("encoded", tmp_path, folder, 5)


@pytest.mark.slow
def test_sides_are_asked_in_turns_in_processes_of_their_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for what in ("encoded", "raw"):
        monkeypatch.setitem(rounds.RIVALS, what, (Entry("ours", f"{what}_ahead"),))
        speeds = compete(what, tmp_path, folder, 5)
        assert len(speeds.ours) == len(speeds.rivals[f"ours {what}_ahead"]) == 5 and min(speeds.ours) > 0
    assert len(memory(Entry("ours", "raw"), tmp_path, [folder, folder]).taken) == 2


def test_memory_of_children_counts() -> None:
    code = "x = bytearray(b'1') * (40 << 20); print(len(x), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        assert 40 << 20 < rounds._tree_bytes(parent.pid) < 120 << 20
        parent.communicate("\n")


def test_the_checks_have_their_names_bounds_and_directions() -> None:
    steady = [1.0, 1.01, 0.99, 1.0, 1.02]

    def at(factor: float) -> list[float]:
        return [factor * x for x in steady]

    encoded = Speeds("encoded", "ours encoded", at(60))
    encoded.rivals = {"ours encoded_in_order": at(90), "rechub flat": at(30), "rechub in_memory": at(1), "fuxictr padded": at(10)}
    raw = Speeds("raw", "ours raw", at(20), {"rechub raw": at(3), "fuxictr raw": at(2)})
    ahead = Speeds("encoded, two cores", "ours encoded_ahead", at(70), {"rechub flat": at(50), "fuxictr padded": at(12)})
    taken = [
        Memory("ours encoded", [100 << 20, 105 << 20]),
        Memory("ours raw", [200 << 20, 230 << 20]),
        Memory("rechub in_memory", [1 << 30, 4 << 30]),
    ]
    found = result([encoded, raw, ahead], taken, (1_000, 4_000))
    checks = {check.name: check for check in found.checks}
    assert {name: (check.at_least, check.at_most) for name, check in checks.items()} == {
        "loader_over_best": (5, None),
        "loader_over_best_shuffled": (5, None),
        "loader_over_best_raw": (5, None),
        "loader_memory_growth": (None, 1.1),
    }
    assert {name: check.value for name, check in checks.items()} == {
        "loader_over_best": 2,
        "loader_over_best_shuffled": 6,
        "loader_over_best_raw": 6.667,
        "loader_memory_growth": 1.15,
    }
    assert {name for name, check in checks.items() if not check.holds} == {"loader_over_best", "loader_memory_growth"}
    assert (
        checks["loader_over_best"].note.startswith("rechub flat: 2.00")
        and "ours raw: 230 MiB at 4,000" in checks["loader_memory_growth"].note
    )
    assert [row["way"] for row in found.rows[:2]] == ["ours encoded", "ours encoded_in_order"]
    assert found.rows[3]["MiB, 4,000 rows"] == "4,096" and len({tuple(row) for row in found.rows}) == 1
    assert '"benchmark": "loader"' in found.json_line()
