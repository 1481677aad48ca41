# SPDX-License-Identifier: Apache-2.0
"""Managed ids where several processes train: the maps of one process, whoever owns which bucket, and whoever owned it before."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recsys.core.config import validate
from recsys.data.loader import TableLoader
from recsys.embedding.tables import EmbeddingTables
from recsys.training.progress import NoProgress
from recsys.training.trainer import Trainer
from tests.recsys.training.distributed import worker
from tests.recsys.training.distributed.test_together import TRAINER, Launched

KEYS = {"item": ("history", "target"), "city": ("city",)}
EXTRA = "_extra_state"


def launched(folder: Path, world: int, **job: object) -> Launched:
    return Launched(folder, world, managed=True, **job)


def ids_of(table: str) -> Tensor:
    return torch.arange(worker.RAW[KEYS[table][0]]) * 12 * 2**40


def rows_by_id(state: dict[str, Tensor], table: str) -> dict[int, int]:
    """Read from the state alone: buckets hold equal ranges of rows behind the first two."""
    found: dict[int, int] = {}
    for number in range(12):
        prefix = f"tables.ids.tables.{table}.{number}.map."
        ids, slots = state[f"{prefix}_mch_sorted_raw_ids"], state[f"{prefix}_mch_remapped_ids_mapping"]
        first = 2 + number * (len(ids) - 1)
        found |= {i: first + slot for i, slot in zip(ids.tolist(), slots.tolist(), strict=True) if i < 2**63 - 1}
    return found


def vectors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every id, as a model would look it up that is no longer trained."""
    ranker = worker.model(managed=True)
    ranker.load_state_dict(state)
    tables = ranker.eval().tables
    assert isinstance(tables, EmbeddingTables)
    weights = {name.split(".")[-2]: weight for name, weight in tables.named_parameters()}
    own = {table: rows_by_id(state, table) for table in KEYS}
    return {table: weights[table].detach()[[own[table].get(i, 1) for i in ids_of(table).tolist()]] for table in KEYS}


def seen(extra: Tensor) -> tuple[list[int], list[tuple[int, ...]]]:
    """Counters and seed, and the sightings since the last round in an order of their own: they come process by process."""
    count = int(extra[2])
    return [*extra[:3].tolist(), int(extra[-1])], sorted(zip(*extra[3:-1].view(-1, max(count, 1)).tolist(), strict=True)) if count else []


def assert_equal_maps(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    maps = [name for name in expected if ".ids." in name]
    assert found.keys() == expected.keys() and len(maps) == 12 * (7 + 6)  # LRU counts nothing
    for name in maps:
        if name.endswith(EXTRA):
            assert seen(found[name]) == seen(expected[name]), name
        else:
            assert torch.equal(found[name], expected[name]), name


def assert_alike(found: Launched, expected: dict[str, Tensor], names: Iterable[str] | None = None) -> None:
    assert found.status == 0, found.log[-4000:]
    weights = found.weights
    assert_equal_maps(weights, expected)
    for name in names or expected:
        if ".ids." not in name:
            torch.testing.assert_close(weights[name], expected[name], rtol=1e-4, atol=2e-5, msg=name)


class Counted(nn.Module):
    """Rows that went from one id to another."""

    def __init__(self) -> None:
        super().__init__()
        self.evictions = dict.fromkeys(KEYS, 0)

    def look(self, module: nn.Module, arguments: object, result: tuple[object, dict]) -> None:
        for table, gone in result[1].items():
            self.evictions[table] += len(gone.rows)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of a trainer without a process group; rows change hands more often than there are rows."""
    ranker = worker.model(managed=True)
    counted = Counted()
    ranker.tables.ids.register_forward_hook(counted.look)
    trainer = Trainer(validate(Trainer.Config, TRAINER), tmp_path_factory.mktemp("alone"), progress=NoProgress())
    loader = TableLoader(worker.managed_data(), worker.to_batch, batch_size=12, seed=3)
    trainer.fit(ranker, loader, worker.validation(worker.managed_data(41, seed=1)))
    assert counted.evictions["item"] > 36 + 20 and counted.evictions["city"] > 24 + 10
    state = {name: tensor.clone() for name, tensor in ranker.state_dict().items()}
    assert all(len(rows_by_id(state, table)) > worker.MANAGED.tables[i].rows * 0.6 for i, table in ((1, "item"), (2, "city")))
    return state


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """An unbroken run of four processes."""
    run = launched(tmp_path_factory.mktemp("four") / "run", 4)
    assert run.status == 0, run.log[-4000:]
    return run


def test_four_processes_have_the_maps_and_the_vectors_of_one(alone: dict[str, Tensor], four: Launched) -> None:
    assert_alike(four, alone)
    for table, expected in vectors(alone).items():
        torch.testing.assert_close(vectors(four.weights)[table], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_a_lost_process_is_replaced_and_the_run_ends_the_same_to_the_bit(four: Launched, tmp_path: Path) -> None:
    run = launched(tmp_path, 4, restarts=1, faults=[{"what": "kill", "rank": 1, "at": 7, "attempt": 0}])
    assert "exitcode: -9" in run.log or "Signal 9" in run.log
    assert run.status == 0, run.log[-4000:]
    assert all(torch.equal(tensor, four.weights[name]) for name, tensor in run.weights.items())


@pytest.mark.slow
def test_a_run_of_four_goes_on_in_three_and_in_two(alone: dict[str, Tensor], tmp_path: Path) -> None:
    assert launched(tmp_path, 4, faults=[{"what": "kill", "rank": 2, "at": 7}]).status != 0
    assert launched(tmp_path, 3, faults=[{"what": "kill", "rank": 0, "at": 14}]).status != 0
    assert_alike(launched(tmp_path, 2), alone)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_four_processes_saved_is_in_any_number_of_them_the_same(world: int, four: Launched, tmp_path: Path) -> None:
    """The run has ended: it is loaded, and not trained."""
    shutil.copytree(four.folder / "run", tmp_path / "run")
    run = launched(tmp_path, world)
    assert run.status == 0, run.log[-4000:]
    assert_equal_maps(run.weights, four.weights)
    assert all(torch.equal(tensor, four.weights[name]) for name, tensor in run.weights.items())
    for table, expected in vectors(four.weights).items():
        assert torch.equal(vectors(run.weights)[table], expected)
        assert len(expected.unique(dim=0)) > 15  # else all ids would read the row of the unknown


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_any_number_of_processes_is_the_same_training(world: int, alone: dict[str, Tensor], tmp_path: Path) -> None:
    assert_alike(launched(tmp_path, world), alone)


@pytest.mark.slow
def test_a_number_of_processes_that_does_not_divide_the_buckets_is_an_error(tmp_path: Path) -> None:
    run = launched(tmp_path, 5)
    assert run.status != 0
    assert "embedding.managed.item.buckets: 12 buckets cannot be shared by 5 processes; expected a multiple of 5" in run.log
