# SPDX-License-Identifier: Apache-2.0
"""Several processes train one model: as one process would, and to the same end whatever happens to them on the way."""

import json
import re
import socket
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recsys.core.config import validate
from recsys.core.errors import CheckpointError
from recsys.data.loader import TableLoader
from recsys.training.guards import STUCK
from recsys.training.launch import command, environment
from recsys.training.progress import NoProgress
from recsys.training.trainer import Trainer
from tests.recsys.training.distributed import worker

WORKER, ROOT = Path(__file__).with_name("worker.py"), Path(__file__).parents[4]
ROWS, STEPS = 101, 18  # of an epoch; of the two epochs
TRAINER = {
    "epochs": 2,
    "checkpoint": {"every_steps": 4, "keep": 3},
    "optimizer": {"name": "adam", "learning_rate": 0.01},
    "monitor": {"metric": "loss", "mode": "min"},
}


class Launched:
    """A run of torchrun in a folder; of ``worker.py``, unless another program is given.

    Attributes:
        status: of the launcher.
        log: what all processes wrote.
    """

    def __init__(self, folder: Path, world: int, restarts: int = 0, worker: Path = WORKER, **job: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        launch = len(list(folder.glob("log-*")))
        what = json.dumps({"trainer": TRAINER, "launch": launch} | job)
        self._log = folder / f"log-{launch}"
        with self._log.open("w") as stream:
            self.status = subprocess.run(
                command([str(worker), str(folder), what], world, restarts),
                env={**environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=stream,
                stderr=stream,
                timeout=300,
            ).returncode

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "weights.safetensors")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def trained_rows(folder: Path) -> list[list[int]]:
    """The rows of each epoch that the final weights have seen: of every step, those of the last attempt at it."""
    attempts: dict[tuple[int, int], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for file in folder.glob("rows-*.jsonl"):
        for text in file.read_text().splitlines():
            line = json.loads(text)
            attempts[line["epoch"], line["step"]][line["attempt"]] += line["rows"]
    epochs: dict[int, list[int]] = defaultdict(list)
    for (epoch, _), rows in attempts.items():
        epochs[epoch] += rows[max(rows, key=lambda attempt: tuple(map(int, attempt.split("."))))]
    return list(epochs.values())


def assert_exactly_once(folder: Path) -> None:
    for rows in trained_rows(folder):
        assert sorted(rows) == list(range(ROWS))


def assert_same(found: Launched, expected: Launched, exact: bool) -> None:
    assert found.status == 0, found.log[-4000:]
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0 if exact else 1e-4, atol=0 if exact else 2e-5, msg=name)
    for mine, theirs in zip(found.result["rows"], expected.result["rows"], strict=True):
        assert mine == (theirs if exact else pytest.approx(theirs, abs=1e-5))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """An unbroken run of three processes."""
    run = Launched(tmp_path_factory.mktemp("three") / "run", 3)
    assert run.status == 0, run.log[-4000:]
    return run


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_any_number_of_processes_is_the_same_training(world: int, three: Launched, tmp_path: Path) -> None:
    run = Launched(tmp_path, world)
    assert_same(run, three, exact=False)
    assert_exactly_once(tmp_path)
    assert_exactly_once(three.folder)


def test_a_lost_process_is_replaced_and_the_run_ends_the_same_to_the_bit(three: Launched, tmp_path: Path) -> None:
    run = Launched(tmp_path, 3, restarts=1, faults=[{"what": "kill", "rank": 1, "at": 6, "attempt": 0}])
    assert "exitcode: -9" in run.log or "Signal 9" in run.log
    assert_same(run, three, exact=True)
    assert_exactly_once(tmp_path)


def test_a_run_goes_on_with_other_numbers_of_processes_and_past_a_damaged_checkpoint(three: Launched, tmp_path: Path) -> None:
    first = Launched(tmp_path, 3, faults=[{"what": "kill", "rank": 2, "at": 7}])
    assert first.status != 0
    second = Launched(tmp_path, 2, faults=[{"what": "kill", "rank": 0, "at": 14}])
    assert second.status != 0
    checkpoints = tmp_path / "run" / "checkpoints"
    whole = [path for path in checkpoints.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    newest = max(whole, key=lambda path: int(path.name.removeprefix("step-")))
    assert newest.name in ("step-8", "step-9", "step-12"), "those begun last may not have been whole yet when the process was killed"
    shard = newest / "shards-1.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    third = Launched(tmp_path, 1)
    assert newest.with_name(f"{newest.name}.invalid").exists()
    assert_same(third, three, exact=False)
    assert_exactly_once(tmp_path)


def test_sigterm_saves_once_for_all_and_the_run_can_go_on(three: Launched, tmp_path: Path) -> None:
    asked = Launched(tmp_path, 3, faults=[{"what": "term", "rank": 1, "at": 5}])
    assert asked.status != 0
    assert "SIGTERM: saved" in asked.log
    assert (tmp_path / "run" / "checkpoints" / "step-5" / "MANIFEST.json").exists()
    assert_same(Launched(tmp_path, 3), three, exact=True)
    assert_exactly_once(tmp_path)


@pytest.mark.slow
def test_a_full_disk_of_one_process_ends_all_and_the_run_can_go_on(three: Launched, tmp_path: Path) -> None:
    full = Launched(tmp_path, 3, faults=[{"what": "full", "rank": 1, "at": 6}])
    assert full.status != 0
    assert re.search(r"checkpoint of step 8: cannot be written: .*File too large", full.log)
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"step-0", "step-4"}, "nothing half-written, and the one before as it was"
    assert_same(Launched(tmp_path, 3), three, exact=True)
    assert_exactly_once(tmp_path)


@pytest.mark.slow
def test_a_bad_batch_of_one_process_is_left_out_by_all(tmp_path: Path) -> None:
    run = Launched(tmp_path, 2, faults=[{"what": "poison", "rank": 1, "at": 3}])
    assert run.status == 0, run.log[-4000:]
    assert run.result["skipped"] == 1
    assert "step 3: left out: labels: task 'click', row 0: expected 0, 1 or NaN, got inf" in run.log
    assert "step 3: left out: the batch of another process is not as it should be" in run.log
    assert all(np.isfinite(row["train_loss"]) for row in run.result["rows"])
    assert all(bool(weight.isfinite().all()) for weight in run.weights.values())


def test_a_process_that_stands_still_is_named_and_the_run_ends(tmp_path: Path) -> None:
    trainer = TRAINER | {"guards": {"stuck_seconds": 15.0}}
    started = time.monotonic()
    run = Launched(tmp_path, 3, trainer=trainer, faults=[{"what": "hang", "rank": 2, "at": 5}])
    assert run.status != 0 and time.monotonic() - started < 120
    assert "nothing has moved for 15 s: process 2 is still loading, after step 4; the others wait for it" in run.log
    assert f"exitcode: {STUCK}" in run.log or f"exitcode  : {STUCK}" in run.log


@pytest.mark.slow
def test_one_process_and_several_do_not_go_on_from_each_other(tmp_path: Path) -> None:
    assert Launched(tmp_path, 2, faults=[{"what": "kill", "rank": 0, "at": 6}]).status != 0
    alone = Trainer(validate(Trainer.Config, TRAINER), tmp_path / "run", progress=NoProgress(), context={"seed": 7})
    with pytest.raises(CheckpointError, match="checkpoint: the checkpoint was written with 'of several processes', this run has"):
        alone.fit(worker.model(), TableLoader(worker.data(), worker.to_batch, batch_size=12, seed=3), lambda _: {"loss": 0.0})


@pytest.mark.slow
def test_an_error_that_every_attempt_would_meet_is_met_once(tmp_path: Path) -> None:
    assert Launched(tmp_path, 2, faults=[{"what": "kill", "rank": 0, "at": 6}]).status != 0
    changed = Launched(tmp_path, 2, restarts=2, trainer=TRAINER | {"clip_norm": 1.0})
    assert changed.status != 0
    assert "trainer.clip_norm: the checkpoint was written with None, this run has 1.0" in changed.log
    assert not (tmp_path / "result.json").exists()


def test_one_process_alone_comes_to_the_same(three: Launched, tmp_path: Path) -> None:
    """The trainer without a process group."""
    ranker = worker.model()
    trainer = Trainer(validate(Trainer.Config, TRAINER), tmp_path, progress=NoProgress())
    loader = TableLoader(worker.data(), worker.to_batch, batch_size=12, seed=3)
    history = trainer.fit(ranker, loader, worker.validation(worker.data(41, seed=1)))
    for name, weight in ranker.state_dict().items():
        torch.testing.assert_close(weight, three.weights[name], rtol=1e-4, atol=2e-5, msg=name)
    for mine, theirs in zip(history.rows(), three.result["rows"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kills_at_random_points(seed: int, three: Launched, tmp_path: Path) -> None:
    """One to three kills, each of a random process before a random step; a new number of processes after each."""
    random = np.random.default_rng(seed)
    worlds = []
    for at in sorted(random.integers(0, STEPS, random.integers(1, 4))):
        worlds.append(int(random.integers(1, 4)))
        Launched(tmp_path, worlds[-1], faults=[{"what": "kill", "rank": int(random.integers(0, worlds[-1])), "at": int(at)}])
    run = Launched(tmp_path, 3)
    assert_same(run, three, exact=set(worlds) == {3})
    assert_exactly_once(tmp_path)
