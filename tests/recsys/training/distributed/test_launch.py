# SPDX-License-Identifier: Apache-2.0
"""The command lines that start several processes."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from recsys.core.errors import ConfigError
from recsys.training.launch import MACHINES, command, environment, join, run
from recsys.training.preemption import RESUMABLE
from tests.recsys.training.distributed.test_together import ROOT, TRAINER, WORKER, Launched, assert_exactly_once, free_port


def test_the_command_names_processes_and_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MACHINES, raising=False)
    line = command(["-m", "package.module", "folder"], 3, 2)
    assert line[3:] == [
        "--standalone",
        "--nproc-per-node=3",
        "--max-restarts=2",
        "--monitor-interval=0.5",
        "-m",
        "package.module",
        "folder",
    ]
    monkeypatch.setenv(MACHINES, "--nnodes=2 --rdzv-endpoint=host:1")
    assert command(["x.py"], 1)[3:5] == ["--nnodes=2", "--rdzv-endpoint=host:1"]
    for processes, restarts in ((0, 0), (1, -1)):
        with pytest.raises(ConfigError, match="expected at least 1 process and 0 restarts"):
            command(["x.py"], processes, restarts)


def test_a_process_that_torchrun_did_not_start_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(ConfigError, match="expected to be started by torchrun"):
        join()


@pytest.mark.slow
def test_sigterm_to_the_launcher_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for name, value in (("PYTHONPATH", str(ROOT)), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    job = {"trainer": TRAINER, "launcher": os.getpid(), "faults": [{"what": "term_launcher", "rank": 1, "at": 5}]}
    assert run([str(WORKER), str(tmp_path), json.dumps(job)], 2) == RESUMABLE
    assert "SIGTERM: saved" in capfd.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step-5" / "MANIFEST.json").exists()
    assert not (tmp_path / "result.json").exists()
    assert run([str(WORKER), str(tmp_path), json.dumps({"trainer": TRAINER, "launch": 1})], 2) == 0
    assert_exactly_once(tmp_path)


@pytest.mark.slow
def test_two_agents_on_one_machine_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on two machines: each agent starts two processes, and all four train together."""
    four = Launched(tmp_path / "four", 4)
    assert four.status == 0, four.log[-3000:]
    monkeypatch.setenv(MACHINES, f"--nnodes=2 --rdzv-backend=c10d --rdzv-id=one --rdzv-endpoint=127.0.0.1:{free_port()}")
    folder = tmp_path / "two"
    folder.mkdir()
    line = command([str(WORKER), str(folder), json.dumps({"trainer": TRAINER, "launch": 0})], 2)
    variables = {**environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    agents = [subprocess.Popen(line, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [agent.wait(timeout=240) for agent in agents] == [0, 0]
    assert json.loads((folder / "result.json").read_text()) == four.result
    assert_exactly_once(folder)
