# SPDX-License-Identifier: Apache-2.0
"""`recsys train`: a recipe's models in two processes come to what they come to in one."""

import json
import re
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipelines.cli import main, train
from pipelines.training import Model
from recsys.core.errors import ConfigError
from tests.pipelines.small import SMALL

WITHOUT_CHANCE = ("ranker.model.dropout=0.0", "ranker.model.head.dropout=0.0", "ranker.training.trainer.epochs=2")


def trained(
    home: Path,
    capsys: pytest.CaptureFixture[str],
    processes: int,
    *more: str,
    model: str = "ranker",
    engine: str = "local",
    force: bool = False,
) -> Path:
    """The result of the model's step."""
    sets = [part for override in (*SMALL, *more) for part in ("--set", override)]
    where = ["--nproc", str(processes), "--engine", engine, "--model", model, "--home", str(home), *["--force"] * force]
    assert main(["train", "quickstart", *where, *sets]) == 0
    found = re.search(rf"^{model}: (/.*)$", capsys.readouterr().out, re.M)
    assert found is not None
    return Path(found[1])


def assert_same_ranker(one: Path, two: Path) -> None:
    assert one.name == two.name, "the number of processes is no part of the key"
    scores, same = (load_file(place / "scores.safetensors") for place in (one, two))
    for name, values in scores.items():
        np.testing.assert_allclose(same[name], values, atol=2e-4, err_msg=name)
    curve, other = (json.loads((place / "ranking.json").read_text())["curve"] for place in (one, two))
    assert [row["step"] for row in curve] == [row["step"] for row in other]
    assert [row["auc"] for row in other] == pytest.approx([row["auc"] for row in curve], abs=1e-3)


def assert_same_retriever(one: Path, two: Path) -> None:
    weights, same = (load_file(place / "model" / "model.safetensors") for place in (one, two))
    assert weights.keys() == same.keys()
    for name, values in weights.items():
        # A bias of keys moves no softmax. Its gradient is what rounding leaves of zero, and Adam makes whole steps of that.
        first = len(values) // 2 if name.endswith("key_value.bias") else 0
        np.testing.assert_allclose(same[name][first:], values[first:], atol=2e-4, err_msg=name)
    curve, other = (json.loads((place / "curve.json").read_text()) for place in (one, two))
    assert [row["step"] for row in curve] == [row["step"] for row in other]
    assert [row["train_loss"] for row in other] == pytest.approx([row["train_loss"] for row in curve], abs=1e-4)
    assert [row["ndcg@10"] for row in other] == pytest.approx([row["ndcg@10"] for row in curve], abs=2e-3)


def test_two_processes_train_the_ranker_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_same_ranker(*(trained(tmp_path / str(processes), capsys, processes, *WITHOUT_CHANCE) for processes in (1, 2)))


@pytest.mark.slow
def test_two_processes_train_the_collaborative_model_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (trained(tmp_path / str(processes), capsys, processes, model="collaborative") for processes in (1, 2))
    assert one.name == two.name, "the number of processes is no part of the key"
    assert_same_retriever(one, two)


@pytest.mark.slow
def test_two_processes_train_the_retriever_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Path(shutil.copytree(trained(tmp_path / "home", capsys, 1, model="retriever"), tmp_path / "one"))
    two = trained(tmp_path / "home", capsys, 2, model="retriever", force=True)
    assert json.loads((two / "curve.json").read_text()) != json.loads((one / "curve.json").read_text()), "it was trained again"
    assert_same_retriever(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ranker", "collaborative"])
def test_two_workers_of_ray_train_as_two_processes_do(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    torchrun, ray = (trained(tmp_path / engine, capsys, 2, model=model, engine=engine) for engine in ("local", "ray"))
    assert torchrun.name == ray.name, "the engine is no part of the key"
    file = "model/model.safetensors"
    ours, theirs = load_file(torchrun / file), load_file(ray / file)
    assert all(np.array_equal(theirs[name], values) for name, values in ours.items())


def test_what_cannot_be_is_an_error(tmp_path: Path) -> None:
    common = ["quickstart", "--home", str(tmp_path), *(part for override in SMALL for part in ("--set", override))]
    with pytest.raises(ConfigError, match="--nproc: expected at least 1, got 0"):
        train.main([*common, "--nproc", "0"])
    with pytest.raises(ConfigError, match="--address: expected it with --engine ray only, got 'auto' with --engine local"):
        train.main([*common, "--address", "auto"])


def test_the_command_knows_the_models_that_processes_train() -> None:
    assert get_args(Model) == train.MODELS
