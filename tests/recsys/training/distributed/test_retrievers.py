# SPDX-License-Identifier: Apache-2.0
"""Several processes train one retriever: as one process would, and to the same end whatever happens to them on the way."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys.core.config import validate
from recsys.data.world import World
from recsys.training.progress import NoProgress
from recsys.training.trainer import Trainer
from tests.recsys.training.distributed import retriever_worker as worker
from tests.recsys.training.distributed.test_together import Launched, trained_rows

WORKER = Path(__file__).with_name("retriever_worker.py")
TRAINER = {
    "epochs": 2,
    "checkpoint": {"every_steps": 3, "keep": 3},
    "optimizer": {"name": "adam", "learning_rate": 0.01},
    "monitor": {"metric": "ndcg", "mode": "max"},
}


def launched(folder: Path, name: str, world: int, **job: Any) -> Launched:
    return Launched(folder, world, worker=WORKER, **{"trainer": TRAINER, "model": name} | job)


def alone(folder: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The course and the weights of a trainer without a process group."""
    retriever = worker.model(name)
    trainer = Trainer(validate(Trainer.Config, TRAINER), folder, progress=NoProgress())
    history = trainer.fit(retriever, worker.loader(World()), worker.validation())
    return history.rows(), retriever.state_dict()


def assert_exactly_once(folder: Path) -> None:
    for events in trained_rows(folder):
        assert sorted(events) == list(range(worker.EVENTS))


def assert_alike(run: Launched, rows: list[dict[str, Any]], weights: dict[str, Tensor]) -> None:
    assert run.status == 0, run.log[-4000:]
    assert run.weights.keys() == weights.keys()
    for name, weight in weights.items():
        # A bias of keys moves no softmax. Its gradient is what rounding leaves of zero, and Adam makes whole steps of that.
        first = len(weight) // 2 if name.endswith("key_value.bias") else 0
        torch.testing.assert_close(run.weights[name][first:], weight[first:], rtol=1e-4, atol=2e-5, msg=name)
    assert [row["train_loss"] for row in run.result["rows"]] == pytest.approx([row["train_loss"] for row in rows], abs=1e-5)
    assert [row["ndcg"] for row in run.result["rows"]] == pytest.approx([row["ndcg"] for row in rows], abs=1e-5)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """An unbroken run of three processes."""
    run = launched(tmp_path_factory.mktemp("three") / "run", "setrec", 3)
    assert run.status == 0, run.log[-4000:]
    return run


def test_the_windows_are_shared_by_processes_that_do_not_divide_them() -> None:
    own = worker.loader(World())
    assert own.windows % own.batch_size not in (0, 3, 6), "so that shares of the last batch differ"
    assert len(own) * TRAINER["epochs"] >= 10, "so that the faults below come before the end"


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("sasrec", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("sasrec", 1), ("sasrec", 3), ("setrec", 1), ("setrec", 2))),
    ],
)
def test_any_number_of_processes_is_the_same_training(name: str, world: int, tmp_path: Path) -> None:
    rows, weights = alone(tmp_path / "alone", name)
    run = launched(tmp_path / "several", name, world)
    assert_alike(run, rows, weights)
    assert_exactly_once(run.folder)


def test_three_processes_train_as_one(three: Launched, tmp_path: Path) -> None:
    assert_alike(three, *alone(tmp_path, "setrec"))
    assert_exactly_once(three.folder)


@pytest.mark.slow
def test_a_lost_process_is_replaced_and_the_run_ends_the_same_to_the_bit(three: Launched, tmp_path: Path) -> None:
    run = launched(tmp_path, "setrec", 3, restarts=1, faults=[{"what": "kill", "rank": 1, "at": 5, "attempt": 0}])
    assert "exitcode: -9" in run.log or "Signal 9" in run.log
    assert run.status == 0, run.log[-4000:]
    assert run.result == three.result, "the digest of the weights among it"
    assert_exactly_once(tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(three: Launched, tmp_path: Path) -> None:
    assert launched(tmp_path, "setrec", 3, faults=[{"what": "kill", "rank": 2, "at": 5}]).status != 0
    assert launched(tmp_path, "setrec", 2, faults=[{"what": "kill", "rank": 0, "at": 9}]).status != 0
    assert_alike(launched(tmp_path, "setrec", 1), three.result["rows"], three.weights)
    assert_exactly_once(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sasrec", "setrec"])
def test_with_drawn_negatives_every_process_draws_its_own_and_all_windows_are_seen(name: str, tmp_path: Path) -> None:
    """Another number of processes is then another course, which ends about as well."""
    one, two = (launched(tmp_path / str(world), name, world, changed={"negatives": 20}) for world in (1, 2))
    for run in (one, two):
        assert run.status == 0, run.log[-4000:]
        assert_exactly_once(run.folder)
    assert one.result["weights"] != two.result["weights"]
    last, same = (run.result["rows"][-1]["train_loss"] for run in (one, two))
    assert last == pytest.approx(same, rel=0.1)


@pytest.mark.slow
def test_a_bad_batch_of_one_process_is_left_out_by_all(tmp_path: Path) -> None:
    run = launched(tmp_path, "sasrec", 2, faults=[{"what": "poison", "rank": 1, "at": 3}])
    assert run.status == 0, run.log[-4000:]
    assert run.result["skipped"] == 1
    assert re.search("step 3: left out: loss: target 0 has target_row=0, target_position=99: outside its history", run.log)
    assert "step 3: left out: the batch of another process is not as it should be" in run.log
    assert all(bool(weight.isfinite().all()) for weight in run.weights.values())
