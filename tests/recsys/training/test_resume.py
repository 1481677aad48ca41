# SPDX-License-Identifier: Apache-2.0
"""A run that was killed and started again ends as one that was not, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("kill_worker.py")
ROOT = Path(__file__).parents[3]

# 5 steps an epoch, a checkpoint every 2 steps and one where validation improves. Epoch 2 is the best, so patience ends the run after 4.
POINTS = [
    "kill:step:1",  # before there is any checkpoint
    "kill:step:4",
    "kill:step:5",
    "kill:step:8",
    "kill:step:13",
    "kill:validate:1",
    "kill:validate:3",
    *(f"kill:write:{n}" for n in (1, 2, 3, 4, 8, 13)),  # while a checkpoint is written
    *(f"kill:put:{n}" for n in (1, 2, 3, 4, 5)),  # just before it, or one that is removed, is renamed
    "kill:step:7+kill:write:2+kill:step:5+term:step:3",
]
TERMINATED = ["term:step:1", "term:step:5", "term:step:12", "term:validate:2", "term:validate:4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The outcome of an unbroken run and of every broken one."""
    folder = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(WORKER), str(folder), "whole", *POINTS, *TERMINATED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    for outcome in outcomes:
        assert outcome["result"], f"{outcome}\n{done.stderr}"
    return {outcome["point"]: outcome for outcome in outcomes}


@pytest.mark.parametrize("point", [*POINTS, *TERMINATED])
def test_a_broken_run_ends_as_an_unbroken_one(runs: dict[str, dict], point: str) -> None:
    whole, broken = runs["whole"]["result"], runs[point]["result"]
    assert broken["rows"] == whole["rows"]
    assert broken["best"] == whole["best"]
    assert broken["weights"] == whole["weights"], "the restored best weights"
    assert broken["newest"] == whole["newest"]
    assert broken["files"] == whole["files"], "last weights, optimizer state, random generators, cursor and history, byte for byte"


@pytest.mark.parametrize("point", POINTS)
def test_the_kill_killed(runs: dict[str, dict], point: str) -> None:
    assert runs[point]["statuses"] == [-9 if one.startswith("kill") else 75 for one in point.split("+")] + [0]


@pytest.mark.parametrize("point", TERMINATED)
def test_sigterm_saves_and_says_that_the_run_can_go_on(runs: dict[str, dict], point: str) -> None:
    assert runs[point]["statuses"] == [75, 0]


def test_the_run_shows_what_it_is_to_show(runs: dict[str, dict]) -> None:
    whole = runs["whole"]["result"]
    assert {"model.safetensors", "optimizers.safetensors", "random.safetensors", "loader.json", "progress.json"} <= whole["files"].keys()
    assert [row["step"] for row in whole["rows"]] == [5, 10, 15, 20]
    assert whole["best"] == 2
