# SPDX-License-Identifier: Apache-2.0
"""Ray Train runs the program that torchrun runs, to the same bits; a lost worker is replaced, and SIGTERM ends all in good order."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recsys.core.engine import Engine, started
from recsys.core.errors import ConfigError
from recsys.training import ray_launch
from recsys.training.launch import FAILED, launch
from recsys.training.preemption import RESUMABLE
from tests.recsys.training.distributed import test_retrievers, test_together
from tests.recsys.training.distributed.test_together import Launched

TWO = Engine(name="ray", workers=2)
PROGRAMS = {"ranker": "worker", "setrec": "retriever_worker"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this machine, which all trainings here use."""
    pytest.importorskip("ray")
    with started(TWO, told=True):
        yield


def job_of(name: str, **more: Any) -> dict[str, Any]:
    trainer = test_together.TRAINER if name == "ranker" else test_retrievers.TRAINER
    return {"model": name, "trainer": trainer, "launch": 0} | more


def by_ray(folder: Path, name: str, restarts: int = 0, **more: Any) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    program = f"tests.recsys.training.distributed.{PROGRAMS[name]}"
    return launch(["-m", program, str(folder), json.dumps(job_of(name, **more))], TWO, folder, restarts)


def by_torchrun(folder: Path, name: str) -> Launched:
    run = Launched(folder, 2, worker=Path(__file__).with_name(f"{PROGRAMS[name]}.py"), **job_of(name))
    assert run.status == 0, run.log[-4000:]
    return run


def assert_same(folder: Path, expected: Launched, name: str) -> None:
    result, weights = json.loads((folder / "result.json").read_text()), load_file(folder / "weights.safetensors")
    assert result == expected.result
    assert all(torch.equal(weights[key], weight) for key, weight in expected.weights.items())
    check = test_together if name == "ranker" else test_retrievers
    check.assert_exactly_once(folder)


@pytest.fixture(scope="module")
def setrec(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """What torchrun comes to."""
    return by_torchrun(tmp_path_factory.mktemp("torchrun") / "setrec", "setrec")


@pytest.mark.usefixtures("cluster")
def test_two_workers_of_ray_train_a_retriever_as_torchrun_does(setrec: Launched, tmp_path: Path) -> None:
    assert by_ray(tmp_path, "setrec") == 0
    assert_same(tmp_path, setrec, "setrec")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_two_workers_of_ray_train_a_ranker_as_torchrun_does(tmp_path: Path) -> None:
    assert by_ray(tmp_path / "ray", "ranker") == 0
    assert_same(tmp_path / "ray", by_torchrun(tmp_path / "torchrun", "ranker"), "ranker")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_lost_worker_is_replaced_and_the_run_ends_the_same_to_the_bit(setrec: Launched, tmp_path: Path) -> None:
    assert by_ray(tmp_path, "setrec", restarts=1, faults=[{"what": "kill", "rank": 1, "at": 5, "attempt": 0}]) == 0
    assert_same(tmp_path, setrec, "setrec")
    lost = by_ray(tmp_path / "again", "setrec", faults=[{"what": "kill", "rank": 1, "at": 5}])
    assert lost not in (0, FAILED, RESUMABLE), "more were lost than may be"


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_sigterm_to_the_launcher_saves_once_for_all_and_the_run_can_go_on(setrec: Launched, tmp_path: Path) -> None:
    asked = by_ray(tmp_path, "setrec", launcher=os.getpid(), faults=[{"what": "term_launcher", "rank": 1, "at": 5}])
    assert asked == RESUMABLE
    assert (tmp_path / "run" / "checkpoints" / "step-5" / "MANIFEST.json").exists()
    assert not (tmp_path / "result.json").exists() and not list(tmp_path.glob("stop-*"))
    assert by_ray(tmp_path, "setrec", launch=1) == 0
    assert_same(tmp_path, setrec, "setrec")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_an_error_that_every_attempt_would_meet_is_met_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert by_ray(tmp_path, "setrec", faults=[{"what": "kill", "rank": 0, "at": 9}]) != 0
    trainer = test_retrievers.TRAINER | {"clip_norm": 1.0}
    assert by_ray(tmp_path, "setrec", restarts=3, trainer=trainer) == FAILED
    assert "trainer.clip_norm: the checkpoint was written with None, this run has 1.0" in capfd.readouterr().err
    assert {path.read_text() for path in tmp_path.glob("starts-*")} == {"+"}, "what is started after it ends before it begins"


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"engine: ray: .*pip install 'recsys-scaling\[ray\]'"):
        launch(["x.py"], TWO, tmp_path)
    with pytest.raises(ConfigError, match="expected at least 0 restarts, got -1"):
        ray_launch.run(["x.py"], TWO, tmp_path, -1)
