# SPDX-License-Identifier: Apache-2.0
"""What each of several processes takes of every batch: together it is the batch, whatever their number and however the rows are encoded."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.data.batch import RankingBatch
from recsys.data.encoded import EncodedColumns
from recsys.data.loader import ParquetLoader, TableLoader
from recsys.data.spec import InputSpec, TableSpec
from recsys.data.world import World, average

SPEC = InputSpec(tables=(TableSpec(name="item", rows=40, bags=("item",)),), dense=("x",), tasks=("like",))
ROWS, BATCH = 53, 12


def table() -> pa.Table:
    random = np.random.default_rng(0)
    columns = {"item": random.integers(0, 40, ROWS).astype(np.int32), "x": np.arange(ROWS, dtype=np.float32)}
    return pa.table(columns | {"like": random.integers(0, 2, ROWS).astype(np.float32)})


def batches(way: str, world: World, folder: Path) -> list[RankingBatch]:
    encoder = EncodedColumns(SPEC)
    if way == "table":
        return list(TableLoader(table(), encoder.transform, batch_size=BATCH, seed=4, world=world))
    path = folder / "rows.parquet"
    if not path.exists():
        pq.write_table(table(), path, row_group_size=10)
    transform = encoder if way == "encoded" else encoder.transform
    return list(ParquetLoader(path, transform, batch_size=BATCH, seed=4, buffer_groups=2, world=world))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("way", ["table", "parquet", "encoded"])
def test_shares_are_the_batch_and_what_is_added_weighs_nothing(way: str, size: int, tmp_path: Path) -> None:
    whole = batches(way, World(), tmp_path)
    shares = [batches(way, World(rank, size), tmp_path) for rank in range(size)]
    assert {len(own) for own in shares} == {len(whole)}
    for number, batch in enumerate(whole):
        parts = [own[number] for own in shares]
        assert {len(part) for part in parts} == {-(-len(batch) // size)}, "as many rows in each"
        real = [part.weights > 0 if part.weights is not None else torch.ones(len(part), dtype=torch.bool) for part in parts]
        assert torch.equal(torch.cat([part.dense[mask] for part, mask in zip(parts, real, strict=True)]), batch.dense)
        assert torch.equal(torch.cat([part.labels[mask] for part, mask in zip(parts, real, strict=True)]), batch.labels)
        ids = [part.sparse["item"].values()[mask] for part, mask in zip(parts, real, strict=True)]
        assert torch.equal(torch.cat(ids), batch.sparse["item"].values())


def test_shares_are_ranges_that_cover_all_rows_once() -> None:
    for size in range(1, 9):
        for rows in range(1, 30):
            taken = [World(rank, size).share(rows) for rank in range(size)]
            assert [row for own, _ in taken for row in own] == list(range(rows))
            assert {len(own) + lacking for own, lacking in taken} == {-(-rows // size)}


def test_one_process_averages_nothing() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert average(x) is x
