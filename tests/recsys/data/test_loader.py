# SPDX-License-Identifier: Apache-2.0
"""Loaders: every row once, an order that seed and epoch decide, bounded memory, and a cursor that resumes at any batch."""

import gc
import threading
import weakref
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.core.config import parse
from recsys.core.errors import CheckpointError, DataError, SchemaError
from recsys.data.encode import Encoder
from recsys.data.loader import Loader, ParquetLoader, TableLoader
from recsys.data.prefetch import prefetch

ROWS = 53
POOLS: list[pa.MemoryPool] = []  # Arrow buffers point to the pool of their memory without keeping it alive
GROUPS = {"one.parquet": 4, "three.parquet": 9, "two.parquet": 30}  # rows per row group


def whole() -> pa.Table:
    return pa.table({"id": np.arange(ROWS), "word": [f"w{i % 7}" for i in range(ROWS)], "tags": [["t"] * (i % 3) for i in range(ROWS)]})


def identity(table: pa.Table) -> pa.Table:
    return table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for (name, size), (first, last) in zip(GROUPS.items(), ((0, 17), (17, 20), (20, ROWS)), strict=True):
        pq.write_table(whole().slice(first, last - first), tmp_path / name, row_group_size=size)
    return tmp_path


def make(kind: str, folder: Path, **changes: Any) -> Loader[pa.Table]:
    options: dict[str, Any] = {"batch_size": 8, "seed": 3} | changes
    if kind == "table":
        return TableLoader(whole(), identity, **options)
    return ParquetLoader(folder, identity, buffer_groups=options.pop("buffer_groups", 2), **options)


def ids(batches: Any) -> list[list[int]]:
    return [batch["id"].to_pylist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


BOTH = pytest.mark.parametrize("kind", ["table", "parquet"])


@BOTH
@pytest.mark.parametrize("buffer_groups", [1, 3, 100])
@pytest.mark.parametrize("batch_size", [1, 8, 53, 54])
def test_an_epoch_holds_every_row_once(kind: str, folder: Path, batch_size: int, buffer_groups: int) -> None:
    changes = {"buffer_groups": buffer_groups} if kind == "parquet" else {}
    loader = make(kind, folder, batch_size=batch_size, **changes)
    batches = list(loader)
    assert len(batches) == len(loader) == -(-ROWS // batch_size)
    assert all(b.num_rows == batch_size for b in batches[:-1])
    rows = [tuple(map(str, row.values())) for b in batches for row in b.to_pylist()]
    assert Counter(rows) == Counter(tuple(map(str, row.values())) for row in whole().to_pylist())


@BOTH
def test_drop_last_leaves_out_what_is_short(kind: str, folder: Path) -> None:
    loader = make(kind, folder, drop_last=True)
    batches = ids(loader)
    assert len(batches) == len(loader) == 6 and batches == ids(make(kind, folder))[:6]
    assert loader.state_dict() == {"epoch": 0, "samples": 48}


@BOTH
def test_the_order_is_a_function_of_seed_and_epoch(kind: str, folder: Path) -> None:
    loader = make(kind, folder)
    first = ids(loader)
    assert ids(loader) == first == ids(make(kind, folder)) == ids(make(kind, folder, prefetch=3))
    loader.set_epoch(1)
    second = ids(loader)
    assert sorted(flat(second)) == sorted(flat(first)) and second != first
    assert ids(make(kind, folder, seed=4)) != first
    loader.set_epoch(0)
    assert ids(loader) == first
    assert flat(ids(make(kind, folder, batch_size=5))) == flat(first)


def test_the_rows_of_a_window_are_in_another_order_every_epoch(tmp_path: Path) -> None:
    pq.write_table(whole(), tmp_path / "a.parquet")
    loader = ParquetLoader(tmp_path, identity, batch_size=ROWS)
    orders = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        orders.append(flat(ids(loader)))
    assert len({tuple(order) for order in orders}) == 3


@BOTH
def test_without_shuffling_the_order_is_that_of_the_data(kind: str, folder: Path) -> None:
    loader = make(kind, folder, shuffle=False)
    loader.set_epoch(2)
    assert flat(ids(loader)) == list(range(ROWS))


def test_rows_are_shuffled_across_the_row_groups_of_a_window(folder: Path) -> None:
    order = flat(ids(make("parquet", folder, buffer_groups=100)))
    neighbours = sum(abs(a - b) == 1 for a, b in pairwise(order))
    assert neighbours < 10


@BOTH
@pytest.mark.parametrize("depth", [0, 2])
def test_resuming_at_every_batch_yields_the_rest(kind: str, folder: Path, depth: int) -> None:
    straight = make(kind, folder, prefetch=depth)
    straight.set_epoch(5)
    states, batches = [straight.state_dict()], []
    for batch in straight:
        batches.append(batch)
        states.append(straight.state_dict())
    assert [s["samples"] for s in states] == [0, 8, 16, 24, 32, 40, 48, 53]
    for position, state in enumerate(states):
        resumed = make(kind, folder, prefetch=depth)
        resumed.load_state_dict(state)
        resumed.set_epoch(5)
        assert [b.to_pydict() for b in resumed] == [b.to_pydict() for b in batches[position:]]
        assert resumed.state_dict() == states[-1]
        assert len(list(resumed)) == len(batches), "the next iteration is a whole epoch again"
    other_size = make(kind, folder, batch_size=5)
    other_size.load_state_dict(states[2])
    assert flat(ids(other_size)) == flat(ids(batches[2:]))


def test_resuming_decodes_nothing_before_the_cursor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, i, **k: (read.append(i), plain(self, i, **k))[1])
    loader = make("parquet", folder, shuffle=False)
    loader.load_state_dict({"epoch": 0, "samples": 24})
    assert flat(ids(loader)) == list(range(24, ROWS))
    assert len(read) == 2, "of the 8 row groups, only the last window"


@BOTH
def test_stopping_early_starts_again(kind: str, folder: Path) -> None:
    loader = make(kind, folder, prefetch=2)
    for _ in loader:
        break
    assert loader.state_dict() == {"epoch": 0, "samples": 8}
    assert len(ids(loader)) == len(loader)
    loader.set_epoch(1)
    assert loader.state_dict() == {"epoch": 1, "samples": 0}


@BOTH
def test_bad_states_are_refused(kind: str, folder: Path) -> None:
    loader = make(kind, folder)
    with pytest.raises(CheckpointError, match=r"samples from 0 to 53, got .*54"):
        loader.load_state_dict({"epoch": 0, "samples": 54})
    with pytest.raises(CheckpointError, match=r"expected epoch >= 0 and samples .*step"):
        loader.load_state_dict({"step": 3})


def test_never_more_than_a_window_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, per_group, width = 24, 500, 400
    table = pa.table({"id": np.arange(groups * per_group), "text": [f"{i:0{width}d}" for i in range(groups * per_group)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=per_group, compression="none", use_dictionary=False)
    group_bytes = table.nbytes // groups
    del table
    windows: list[weakref.ref[pa.Table]] = []
    sizes: list[int] = []
    read_window = ParquetLoader._read

    def watch_window(self: ParquetLoader[pa.Table], row_groups: Any) -> pa.Table:
        assert all(window() is None for window in windows), "the window before is still alive"
        found = read_window(self, row_groups)
        windows.append(weakref.ref(found))
        sizes.append(len(row_groups))
        return found

    monkeypatch.setattr(ParquetLoader, "_read", watch_window)
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    POOLS.append(pool)
    pa.set_memory_pool(pool)
    try:
        loader = ParquetLoader(
            tmp_path / "a.parquet", lambda t: (t["id"].to_numpy(), t["text"].num_chunks)[0], batch_size=64, buffer_groups=2
        )
        rows = sum(len(batch) for batch in loader)
        peak = pool.max_memory()
    finally:
        pa.set_memory_pool(pa.default_memory_pool())
    assert rows == groups * per_group and sizes == [2] * 12
    assert 2 * group_bytes <= peak < 6 * group_bytes, "the file has 24 row groups"


def test_columns_are_projected_and_checked(folder: Path) -> None:
    loader = ParquetLoader([folder / "one.parquet"], identity, batch_size=4, columns=["tags", "id"])
    assert {frozenset(b.column_names) for b in loader} == {frozenset(("tags", "id"))}
    with pytest.raises(SchemaError, match=r"one.parquet: missing column: unknown column 'wrod'; did you mean 'word'"):
        ParquetLoader(folder, identity, batch_size=4, columns=["wrod"])
    pq.write_table(pa.table({"id": ["x"], "word": ["w"], "tags": [["t"]]}), folder / "zero.parquet")
    with pytest.raises(SchemaError, match=r"zero.parquet: column 'id': expected int64 as in .*one.parquet, got string"):
        ParquetLoader(folder, identity, batch_size=4)
    ParquetLoader(folder, identity, batch_size=4, columns=["word"])


def test_no_files_and_bad_sizes_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Parquet file"):
        ParquetLoader(tmp_path, identity, batch_size=4)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        TableLoader(whole(), identity, batch_size=0)
    assert list(TableLoader(whole().slice(0, 0), identity, batch_size=4)) == []


def test_encoded_batches_are_those_of_the_whole_table(folder: Path) -> None:
    features = [{"kind": "categorical", "feature": "word"}, {"kind": "bag", "feature": "tags"}]
    encoder = Encoder.fit(parse(Encoder.Config, {"features": features}, source="test"), whole())
    loader = ParquetLoader(folder, encoder.transform, batch_size=10, shuffle=False, prefetch=2)
    words = [row for batch in loader for row in batch.sparse["word"].values().tolist()]
    assert words == encoder.transform(whole()).sparse["word"].values().tolist()


class Words:
    """A `RowEncoder` whose rows are tables, of which it notes what it was given."""

    def __init__(self) -> None:
        self.seen: list[pa.Table] = []

    def rows(self, table: pa.Table) -> "Held":
        self.seen.append(table)
        return Held(table)


class Held:
    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def take(self, rows: np.ndarray) -> "Held":
        return Held(self.table.take(pa.array(rows)))

    def concat(self, others: Any) -> "Held":
        return Held(pa.concat_tables([self.table, *(other.table for other in others)]))

    def batch(self) -> pa.Table:
        return self.table


@pytest.mark.parametrize(
    "changes", [{}, {"prefetch": 2}, {"drop_last": True}, {"shuffle": False}, {"buffer_groups": 1}, {"batch_size": 100}]
)
@pytest.mark.parametrize("samples", [0, 8, 24, 50, ROWS])
def test_a_row_encoder_changes_neither_order_nor_cursor(folder: Path, changes: dict[str, Any], samples: int) -> None:
    options = {"batch_size": 8, "seed": 3, "buffer_groups": 2} | changes
    plain, encoded = ParquetLoader(folder, identity, **options), ParquetLoader(folder, Words(), **options)
    for loader in (plain, encoded):
        loader.load_state_dict({"epoch": 1, "samples": samples})
    assert ids(encoded) == ids(plain)
    assert encoded.state_dict() == plain.state_dict()


def test_a_row_encoder_gets_a_row_group_at_a_time_with_strings_as_dictionaries(folder: Path) -> None:
    words = Words()
    list(ParquetLoader(folder, words, batch_size=8))
    assert sorted(table.num_rows for table in words.seen) == sorted([4, 4, 4, 4, 1, 3, 30, 3])
    kinds = {(str(table["word"].type), str(table["tags"].type.value_type)) for table in words.seen}
    assert kinds == {("dictionary<values=string, indices=int32, ordered=0>",) * 2}


def test_an_encoder_gives_the_batches_of_its_transform(folder: Path) -> None:
    features = [{"kind": "categorical", "feature": "word"}, {"kind": "bag", "feature": "tags"}, {"kind": "dense", "feature": "id"}]
    encoder = Encoder.fit(parse(Encoder.Config, {"features": features}, source="test"), whole().slice(0, 30))
    options: dict[str, Any] = {"batch_size": 10, "buffer_groups": 3}
    pairs = zip(ParquetLoader(folder, encoder, **options), ParquetLoader(folder, encoder.transform, **options), strict=True)
    for ours, theirs in pairs:
        assert torch.equal(ours.sparse.values(), theirs.sparse.values()) and torch.equal(ours.sparse.lengths(), theirs.sparse.lengths())
        assert torch.equal(ours.dense, theirs.dense)


@BOTH
def test_an_error_in_the_background_arrives_in_its_place(kind: str, folder: Path) -> None:
    def fail(table: pa.Table) -> int:
        if 30 in table["id"].to_pylist():
            raise RuntimeError("row 30")
        return table.num_rows

    loader: Any = make(kind, folder, shuffle=False, prefetch=2)
    loader._transform = fail
    seen = []
    with pytest.raises(RuntimeError, match="row 30"):
        for rows in loader:
            seen.append(rows)
    assert seen == [8, 8, 8] and loader.state_dict()["samples"] == 24
    assert not _prefetchers()


def test_prefetching_keeps_order_and_runs_ahead_no_further_than_asked() -> None:
    made: list[int] = []
    enough = threading.Event()

    def source() -> Any:
        for i in range(20):
            made.append(i)
            if i == 3:
                enough.set()
            yield i

    stream = prefetch(source(), 3)
    assert next(stream) == 0 and enough.wait(5)
    assert len(made) <= 1 + 3 + 1, "one taken, three waiting, one at the door"
    assert list(stream) == list(range(1, 20)) and not _prefetchers()


def test_closing_early_ends_the_thread_and_closes_the_source() -> None:
    closed = threading.Event()

    def source() -> Any:
        try:
            yield from range(1000)
        finally:
            closed.set()

    elements = source()
    stream = prefetch(elements, 2)
    assert next(stream) == 0 and _prefetchers()
    stream.close()
    assert closed.is_set() and not _prefetchers()
    dropped = prefetch(source(), 2)
    next(dropped)
    del dropped
    gc.collect()
    assert not _prefetchers()


def _prefetchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]
