# SPDX-License-Identifier: Apache-2.0
"""Scattered tables: what goes in comes out, part by part, in order; where a key belongs never changes."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.core.errors import DataError, SchemaError
from recsys.core.scatter import Scattered, chunks, gather, gather_table, part_of, read_chunk, regroup, scattered_files, schema_of

PINNED = [30, 5, 62, 34, 38]


def _write(folder: Path, sizes: list[int], row_group: int) -> pa.Table:
    """Files of so many rows in a folder; returns all of them as one table."""
    folder.mkdir()
    table = pa.table({"key": [f"k{i % 17}" for i in range(sum(sizes))], "place": range(sum(sizes))})
    first = 0
    for number, size in enumerate(sizes):
        pq.write_table(table.slice(first, size), folder / f"{number:02d}.parquet", row_group_size=row_group)
        first += size
    return table


@pytest.mark.parametrize(("sizes", "row_group", "rows"), [([100], 7, 20), ([50, 0, 31], 100, 10), ([0], 5, 5), ([40, 40], 10, 1000)])
def test_chunks_hold_every_row_once_in_order(tmp_path: Path, sizes: list[int], row_group: int, rows: int) -> None:
    table = _write(tmp_path / "t", sizes, row_group)
    found = chunks(tmp_path / "t", rows)
    assert all(chunk.rows <= max(rows, row_group) for chunk in found) and len({chunk.path for chunk in found}) == len(sizes)
    pieces = [piece for chunk in found for piece in read_chunk(chunk, table.schema, rows=rows)]
    assert pa.concat_tables([piece for _, piece in pieces]).equals(table)
    assert all(piece.num_rows <= rows and piece.column("place").to_pylist()[:1] in ([], [first]) for first, piece in pieces)


@pytest.mark.parametrize("parts", [1, 3, 40])
def test_a_part_holds_its_rows_in_the_order_of_the_source(tmp_path: Path, parts: int) -> None:
    table = _write(tmp_path / "t", [120, 90], 25)
    for number, chunk in enumerate(chunks(tmp_path / "t", 60)):
        with Scattered(tmp_path / "s" / f"{number:06d}.parquet", table.schema, parts) as writer:
            for _, piece in read_chunk(chunk, table.schema, rows=13):
                writer.write(piece, part_of(piece.column("key"), parts))
    files = scattered_files(tmp_path / "s")
    part = part_of(table.column("key"), parts)
    for number in range(parts):
        assert gather_table(files, number, parts).equals(table.filter(pa.array(part == number)))
        assert len(list(gather(files, number, parts))) == len(files)


def test_a_file_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    table = _write(tmp_path / "t", [10], 10)
    with pytest.raises(KeyboardInterrupt), Scattered(tmp_path / "s" / "0.parquet", table.schema, 2) as writer:
        writer.write(table, part_of(table.column("key"), 2))
        raise KeyboardInterrupt
    assert list((tmp_path / "s").iterdir()) == []


def test_the_part_of_a_key_is_pinned() -> None:
    """Files of parts outlive a release: another choice would have to be told apart by `HASH`."""
    keys = ["", "1", "u7", "ü", "user/1"]
    assert part_of(pa.array(keys), 64).tolist() == PINNED
    assert part_of(pa.array(["1", None]).dictionary_encode(), 64).tolist() == [PINNED[1], PINNED[0]]
    assert part_of(pa.chunked_array([pa.array([1], pa.int32()), pa.array([1], pa.int32())]), 64).tolist() == [PINNED[1]] * 2
    assert part_of(pa.array([], pa.string()), 64).tolist() == []
    spread = np.bincount(part_of(pa.array([f"user-{i}" for i in range(300_000)]), 64), minlength=64)
    assert abs(spread - 300_000 / 64).max() < 5 * np.sqrt(300_000 / 64)


def test_tables_are_cut_anew() -> None:
    table = pa.table({"a": range(25)})
    pieces = [table.slice(0, 3), table.slice(3, 0), table.slice(3, 20), table.slice(23, 2)]
    assert [piece.num_rows for piece in regroup(pieces, table.schema, 8)] == [8, 8, 8, 1]
    assert pa.concat_tables(regroup(pieces, table.schema, 5)).equals(table)
    assert [piece.num_rows for piece in regroup([], table.schema, 5)] == [0]


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing: no such file"):
        chunks(tmp_path / "nothing")
    (tmp_path / "t").mkdir()
    with pytest.raises(DataError, match="expected Parquet files, found none"):
        chunks(tmp_path / "t")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t" / "0.parquet")
    pq.write_table(pa.table({"b": [1]}), tmp_path / "t" / "1.parquet")
    pq.write_table(pa.table({"a": ["x"]}), tmp_path / "t" / "2.parquet")
    pq.write_table(pa.table({"a": pa.array([2], pa.int32())}), tmp_path / "t" / "3.parquet")
    found, schema = chunks(tmp_path / "t"), schema_of(tmp_path / "t")
    with pytest.raises(SchemaError, match=r"1.parquet: missing column: unknown column 'a'"):
        list(read_chunk(found[1], schema))
    with pytest.raises(SchemaError, match=r"2.parquet: column 'a': expected int64 as in the first file, got string"):
        list(read_chunk(found[2], schema))
    assert next(read_chunk(found[3], schema))[1].column("a").to_pylist() == [2]
    (tmp_path / "t" / "4.parquet").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"4.parquet: cannot be read"):
        chunks(tmp_path / "t")
