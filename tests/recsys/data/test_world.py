# SPDX-License-Identifier: Apache-2.0
"""What each of several processes takes of every batch: together it is the batch, whatever their number and however the rows are encoded."""

from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.core.config import validate
from recsys.data.batch import RankingBatch, SequenceBatch
from recsys.data.encoded import EncodedColumns
from recsys.data.jagged import Jagged
from recsys.data.loader import ParquetLoader, TableLoader
from recsys.data.sequences import SequenceData
from recsys.data.spec import InputSpec, TableSpec
from recsys.data.windows import SequenceLoader
from recsys.data.world import World, average, pooled, shared_count

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
    assert average(x) is x and torch.equal(pooled(x), x)


WINDOWS = {
    "plain": {},
    "alike": {"alike": True},
    "augmented": {"augmentation": {"reverse": 0.5, "jitter": 1.0, "hide": 0.3}},
}


def window_loader(way: str, world: World, batch_size: int = 8) -> SequenceLoader:
    random = np.random.default_rng(1)
    offsets = np.append(0, np.cumsum(random.integers(1, 15, 20)))
    data = SequenceData.from_order([str(user) for user in range(20)], Jagged(random.integers(0, 99, offsets[-1]), offsets))
    return SequenceLoader(data, 5, batch_size, seed=2, config=validate(SequenceLoader.Config, WINDOWS[way]), world=world)


def told(batch: SequenceBatch) -> list[tuple[tuple[int, ...], int, int]]:
    """(history, how much of it is seen, target), in the order of the batch."""
    histories = [tuple(part.tolist()) for part in torch.tensor_split(batch.items, batch.offsets[1:-1])]
    named = zip(batch.target_row.tolist(), batch.target_position.tolist(), batch.targets.tolist(), strict=True)
    return [(histories[row], position, target) for row, position, target in named]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("way", list(WINDOWS))
def test_shares_of_windows_are_the_batch_and_what_is_added_predicts_nothing(way: str, size: int) -> None:
    for epoch in (0, 1):
        loaders = [window_loader(way, World()), *(window_loader(way, World(rank, size)) for rank in range(size))]
        for loader in loaders:
            loader.set_epoch(epoch)
        for batch, *parts in zip(*loaders, strict=True):
            assert {len(part) for part in parts} == {-(-len(batch) // size)}, "as many rows in each"
            assert [line for part in parts for line in told(part)] == told(batch)
            assert len({str(loader.state_dict()) for loader in loaders}) == 1, "the cursor is that of all"


@pytest.mark.parametrize("way", ["plain", "augmented"])
def test_any_number_of_processes_goes_on_with_the_windows_that_are_left(way: str) -> None:
    whole = [line for batch in window_loader(way, World()) for line in told(batch)]
    three = [window_loader(way, World(rank, 3)) for rank in range(3)]
    taken = [told(part) for parts in islice(zip(*three, strict=True), 2) for part in parts]
    two = [window_loader(way, World(rank, 2), batch_size=5) for rank in range(2)]
    for loader in two:
        loader.load_state_dict(three[0].state_dict())
    taken += [told(part) for parts in zip(*two, strict=True) for part in parts]
    assert [line for lines in taken for line in lines] == whole


def test_a_loss_divides_by_one_where_there_is_nothing() -> None:
    like = torch.zeros(2, dtype=torch.float64)
    assert shared_count(0, like) == 1 and shared_count(3, like) == 3
    assert shared_count(3, like).dtype == torch.float64 and shared_count(3, like.half()).dtype == torch.float32
