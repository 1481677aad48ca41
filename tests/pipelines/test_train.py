# SPDX-License-Identifier: Apache-2.0
"""`recsys train`: a recipe's ranker in two processes comes to what it comes to in one."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipelines.cli import main, train
from recsys.core.errors import ConfigError
from tests.pipelines.small import SMALL


def trained(home: Path, capsys: pytest.CaptureFixture[str], processes: int, *more: str) -> Path:
    """The result of the ranker's step."""
    sets = [part for override in (*SMALL, *more) for part in ("--set", override)]
    assert main(["train", "quickstart", "--nproc", str(processes), "--home", str(home), *sets]) == 0
    found = re.search(r"^ranker: (/.*)$", capsys.readouterr().out, re.M)
    assert found is not None
    return Path(found[1])


def test_two_processes_train_the_ranker_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without_chance = ("ranker.model.dropout=0.0", "ranker.model.head.dropout=0.0", "ranker.training.trainer.epochs=2")
    one, two = (trained(tmp_path / str(processes), capsys, processes, *without_chance) for processes in (1, 2))
    assert one.name == two.name, "the number of processes is no part of the key"
    scores, same = (load_file(place / "scores.safetensors") for place in (one, two))
    for name, values in scores.items():
        np.testing.assert_allclose(same[name], values, atol=2e-4, err_msg=name)
    curve, other = (json.loads((place / "ranking.json").read_text())["curve"] for place in (one, two))
    assert [row["step"] for row in curve] == [row["step"] for row in other]
    assert [row["auc"] for row in other] == pytest.approx([row["auc"] for row in curve], abs=1e-3)


def test_no_process_is_an_error(tmp_path: Path) -> None:
    sets = [part for override in SMALL for part in ("--set", override)]
    with pytest.raises(ConfigError, match="--nproc: expected at least 1, got 0"):
        train.main(["quickstart", "--nproc", "0", "--home", str(tmp_path), *sets])
