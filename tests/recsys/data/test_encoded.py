# SPDX-License-Identifier: Apache-2.0
"""Encoded rows: gathered batches equal encoding the rows themselves, and what is written comes back."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.core.config import parse
from recsys.core.errors import DataError, SchemaError
from recsys.data import encoded as module
from recsys.data.batch import RankingBatch
from recsys.data.encode import Encoder
from recsys.data.encoded import EncodedColumns, write_rows
from recsys.data.loader import ParquetLoader
from recsys.data.spec import InputSpec, TableSpec

CONFIG: dict[str, Any] = {
    "features": [
        {"kind": "categorical", "feature": "a"},
        {"kind": "bag", "feature": "tags"},
        {"kind": "bucket", "feature": "age", "buckets": 4},
        {"kind": "categorical", "feature": "b", "ids": "hashed", "rows": 50},
        {"kind": "bag", "feature": "words", "table": "tags"},
        {"kind": "dense", "feature": "x"},
        {
            "kind": "sequence",
            "name": "history",
            "items": "items",
            "target": "item",
            "max_length": 3,
            "extra": [{"feature": "ratings", "values": [1, 2]}, {"feature": "kinds"}],
        },
    ],
    "tasks": [{"name": "like", "feature": "y"}],
    "weight": "w",
}


def some(seed: int, rows: int) -> pa.Table:
    random = np.random.default_rng(seed)

    def words(count: int) -> list[str | None]:
        return [None if random.random() < 0.1 else f"v{random.integers(12)}" for _ in range(count)]

    lengths = random.integers(0, 5, rows)
    columns: dict[str, Any] = {name: pa.array(words(rows), pa.string()) for name in ("a", "b", "item")}
    for name in ("tags", "words"):
        columns[name] = pa.array(
            [None if random.random() < 0.1 else words(random.integers(0, 4)) for _ in range(rows)], pa.list_(pa.string())
        )
    columns |= {name: pa.array([words(n) for n in lengths], pa.list_(pa.string())) for name in ("items", "kinds")}
    columns["ratings"] = pa.array([random.integers(1, 4, n).tolist() for n in lengths], pa.list_(pa.int64()))
    columns |= {name: pa.array(random.normal(size=rows), mask=random.random(rows) < 0.1) for name in ("x", "age")}
    columns |= {"y": pa.array(random.integers(0, 2, rows)), "w": pa.array(random.random(rows))}
    return pa.table(columns)


def encoder(table: pa.Table, **changes: Any) -> Encoder:
    return Encoder.fit(parse(Encoder.Config, CONFIG | changes, source="test"), table)


def assert_equal(ours: RankingBatch, theirs: RankingBatch) -> None:
    for mine, other in ((ours.sparse, theirs.sparse), (ours.sequences, theirs.sequences)):
        assert mine.keys() == other.keys() and mine.stride() == other.stride()
        assert mine.values().dtype == torch.int64 and mine.lengths().dtype == torch.int32
        assert torch.equal(mine.values(), other.values()) and torch.equal(mine.lengths(), other.lengths())
    for mine, other in ((ours.dense, theirs.dense), (ours.labels, theirs.labels), (ours.weights, theirs.weights)):
        assert (mine is None and other is None) or torch.equal(mine, other)


def dictionaries(table: pa.Table) -> pa.Table:
    """With all strings as dictionaries, those in lists too."""
    for place, field in enumerate(table.schema):
        column = table[field.name].combine_chunks()
        if pa.types.is_string(field.type):
            table = table.set_column(place, field.name, column.dictionary_encode())
        elif pa.types.is_list(field.type) and pa.types.is_string(field.type.value_type):
            lists = pa.ListArray.from_arrays(column.offsets, column.values.dictionary_encode(), mask=column.is_null())
            table = table.set_column(place, field.name, lists)
    return table


@pytest.mark.parametrize("seed", range(5))
def test_gathered_rows_are_the_rows_encoded(seed: int) -> None:
    table = some(seed, 60)
    fitted, random = encoder(table.slice(0, 40)), np.random.default_rng(seed)
    rows = fitted.rows(table)
    assert len(rows) == 60
    for count in (1, 7, 60):
        order = random.integers(0, 60, count)
        assert_equal(rows.take(order).batch(), fitted.transform(table.take(pa.array(order))))
    parts = [fitted.rows(table.slice(a, b - a)) for a, b in ((0, 20), (20, 21), (21, 60))]
    assert_equal(parts[0].concat(parts[1:]).batch(), rows.batch())
    assert_equal(rows.take(np.arange(5, 30)).concat([rows.take(np.arange(30, 33))]).batch(), fitted.transform(table.slice(5, 28)))


@pytest.mark.parametrize("seed", range(3))
def test_dictionaries_change_nothing(seed: int) -> None:
    table = some(seed, 80)
    fitted = encoder(table.slice(0, 50))
    coded = dictionaries(table)
    assert_equal(fitted.transform(coded), fitted.transform(table))
    assert_equal(fitted.transform(coded.slice(70)), fitted.transform(table.slice(70)))  # a dictionary larger than its rows
    chunked = pa.concat_tables([dictionaries(table.slice(0, 30)), dictionaries(table.slice(30))])
    assert_equal(fitted.transform(chunked), fitted.transform(table))
    assert encoder(coded.slice(0, 50)).fingerprint() == fitted.fingerprint()


def test_a_null_in_a_dictionary_is_no_value() -> None:
    only = parse(Encoder.Config, {"features": [{"kind": "categorical", "feature": "c"}]}, source="test")
    fitted = Encoder.fit(only, pa.table({"c": ["x", "y", "x"]}))
    indices = pa.array([0, 1, 2, None, 1], pa.int8())
    column = pa.DictionaryArray.from_arrays(indices, pa.array(["y", None, "new"]))
    assert fitted.transform(pa.table({"c": column})).sparse.values().tolist() == [3, 0, 1, 0, 0]
    full = pa.DictionaryArray.from_arrays(pa.array([*range(128), None], pa.int8()), pa.array([f"{i}" for i in range(127)] + ["x"]))
    assert fitted.transform(pa.table({"c": full})).sparse.values().tolist() == [1] * 127 + [2, 0]


@pytest.mark.parametrize("group_rows", [8, 32_768])
def test_what_is_written_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_rows: int) -> None:
    monkeypatch.setattr(module, "GROUP_ROWS", group_rows)
    table = some(1, 50)
    fitted = encoder(table, weight=None)
    path = tmp_path / "rows.parquet"
    batches = [fitted.transform(table.slice(a, 11)) for a in range(0, 50, 11)]
    write_rows(path, fitted.spec, batches, lists=fitted.list_keys)
    metadata = pq.read_metadata(path)
    assert metadata.num_rows == 50 and metadata.row_group(0).num_rows == min(group_rows, 50)
    assert all(metadata.row_group(g).num_rows == group_rows for g in range(metadata.num_row_groups - 1))
    assert not any(field.nullable for field in metadata.schema.to_arrow_schema())
    reader = EncodedColumns(fitted.spec)
    assert set(reader.columns) == set(metadata.schema.to_arrow_schema().names)
    assert_equal(reader.transform(pq.read_table(path)), fitted.transform(table))
    assert_equal(reader.transform(pq.read_table(path).slice(13, 20)), fitted.transform(table.slice(13, 20)))
    read = list(ParquetLoader(path, reader, batch_size=9, shuffle=False))
    for start, batch in zip(range(0, 50, 9), read, strict=True):
        assert_equal(batch, fitted.transform(table.slice(start, 9)))
    assert sorted(tmp_path.iterdir()) == [path]


def test_raw_ids_keep_all_their_bits(tmp_path: Path) -> None:
    raw = {"features": [{"kind": "categorical", "feature": "a", "ids": "raw", "rows": 10}], "tasks": [{"name": "y", "feature": "y"}]}
    table = some(2, 30)
    fitted = Encoder.fit(parse(Encoder.Config, raw, source="test"), table)
    batch = fitted.transform(table)
    assert int(batch.sparse.values().max()) > 2**40
    write_rows(tmp_path / "rows.parquet", fitted.spec, [batch], lists=())
    assert_equal(EncodedColumns(fitted.spec).transform(pq.read_table(tmp_path / "rows.parquet")), batch)
    assert module.is_wide(InputSpec(tables=(TableSpec(name="t", rows=2**31, bags=("t",)),), tasks=()))
    assert not module.is_wide(InputSpec(tables=(TableSpec(name="t", rows=2**31 - 1, bags=("t",)),), tasks=()))


def test_what_cannot_be_written_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    table = some(3, 20)
    fitted = encoder(table)
    batch, path = fitted.transform(table), tmp_path / "rows.parquet"
    with pytest.raises(DataError, match=r"key 'tags', row \d+: \d ids, expected one; name the key among the lists"):
        write_rows(path, fitted.spec, [batch], lists=fitted.list_keys - {"tags"})
    with pytest.raises(DataError, match="labels: an encoded row needs one"):
        write_rows(path, fitted.spec, [fitted.transform(table.drop_columns(["y"]))], lists=fitted.list_keys)
    with pytest.raises(DataError, match="expected at least one batch to write, got none"):
        write_rows(path, fitted.spec, [], lists=fitted.list_keys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(["x", "y"]), r"column 'k': expected integers or lists of them without nulls, got string"),
        (pa.array([1, None]), r"column 'k': expected no nulls in encoded rows, got 1"),
        (pa.array([[1], [None]]), r"column 'k': expected integers or lists of them without nulls, got list<item: int64>"),
        (pa.array([1.0, 2.0]), r"column 'k': expected integers or lists of them without nulls, got double"),
    ],
)
def test_columns_that_are_not_ids_are_named(column: pa.Array, message: str) -> None:
    reader = EncodedColumns(InputSpec(tables=(TableSpec(name="t", rows=9, bags=("k",)),), dense=("d",), tasks=("y",)))
    good = {"k": pa.array([1, 2]), "d": pa.array([0.5, 1]), "y": pa.array([0, 1])}
    assert reader.transform(pa.table(good)).sparse.values().tolist() == [1, 2]
    with pytest.raises(SchemaError, match=message):
        reader.transform(pa.table(good | {"k": column}))
    with pytest.raises(SchemaError, match="column 'd': expected numbers without nulls, got string"):
        reader.transform(pa.table(good | {"d": pa.array(["a", "b"])}))
    with pytest.raises(SchemaError, match="missing column: unknown column 'y'"):
        reader.transform(pa.table({name: good[name] for name in ("k", "d")}))


def test_labels_are_in_all_parts_or_in_none() -> None:
    table = some(4, 10)
    fitted = encoder(table)
    with pytest.raises(DataError, match="labels: expected in all rows or in none, but 1 of 2 parts have them"):
        fitted.rows(table).concat([fitted.rows(table.drop_columns(["y"]))])
