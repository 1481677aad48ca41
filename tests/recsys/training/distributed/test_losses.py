# SPDX-License-Identifier: Apache-2.0
"""The mean over processes of retrievers' losses, and of their gradients, is that of the whole batch."""

import json
import subprocess
from pathlib import Path

import pytest

from recsys.training.launch import command, environment
from tests.recsys.training.distributed import losses
from tests.recsys.training.distributed.test_together import ROOT

PROGRAM = Path(__file__).with_name("losses.py")


@pytest.mark.parametrize("world", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_shares_have_the_losses_and_the_gradients_of_the_batch(world: int, tmp_path: Path) -> None:
    variables = {**environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command([str(PROGRAM), str(tmp_path)], world), env=variables, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == losses.CASES.keys()
    for case, about in found.items():
        assert len(about["losses"]) == (2 if "routed" in case else 3), case
        assert min(about["losses"]) > 0.1 and min(about["gradients"]) > 1e-3, case
        assert about["difference"] < 1e-6, (case, about)
