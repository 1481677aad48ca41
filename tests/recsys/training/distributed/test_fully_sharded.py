# SPDX-License-Identifier: Apache-2.0
"""The dense part in parts: the same training as with a copy in each process, and an N-th of it in each."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recsys.core.errors import ConfigError
from recsys.training.fully_sharded import DenseParts, blocks
from recsys.training.launch import command, environment
from tests.recsys.training.distributed import counted, worker
from tests.recsys.training.distributed.test_together import ROOT, TRAINER, Launched

COUNTED = Path(__file__).with_name("counted.py")
LONG = TRAINER | {"epochs": 3, "log_every": 1, "clip_norm": 0.3}  # 27 steps
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def trainer(dense: str, **other: Any) -> dict[str, Any]:
    return LONG | {"distribution": {"dense": dense}} | other


def steps(run: Launched, name: str) -> list[float]:
    """What every step recorded under a name."""
    lines = [json.loads(line) for line in (run.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def assert_close(found: Launched, expected: Launched) -> None:
    """The same course within 1e-5: every loss, every norm, every weight."""
    assert found.status == 0, found.log[-4000:]
    for name in ("batch_loss", "gradient_norm"):
        assert len(steps(expected, name)) > 20
        assert steps(found, name) == pytest.approx(steps(expected, name), rel=1e-5, abs=1e-5), name
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, **CLOSE, msg=name)


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Two processes with a copy each."""
    run = Launched(tmp_path_factory.mktemp("replicated") / "run", 2, trainer=trainer("replicated"))
    assert run.status == 0, run.log[-4000:]
    return run


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Two processes with a part each."""
    run = Launched(tmp_path_factory.mktemp("sharded") / "run", 2, trainer=trainer("sharded"))
    assert run.status == 0, run.log[-4000:]
    return run


def test_parts_train_as_copies_do(sharded: Launched, replicated: Launched) -> None:
    assert_close(sharded, replicated)
    assert min(steps(replicated, "gradient_norm")) < LONG["clip_norm"] < max(steps(replicated, "gradient_norm")), "some are clipped"


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_any_number_of_parts_is_the_same_training(world: int, replicated: Launched, tmp_path: Path) -> None:
    """With three, some parameters have fewer rows than there are processes."""
    assert_close(Launched(tmp_path, world, trainer=trainer("sharded")), replicated)


@pytest.mark.slow
def test_blocks_that_add_penalties_train_as_copies_do(tmp_path: Path) -> None:
    """Each block adds to one list, which FSDP would replace on the way. In small steps, lest experts amplify what is rounded otherwise."""
    own = {"optimizer": {"name": "adamw", "learning_rate": 0.0001, "weight_decay": 0.1}}
    runs = [Launched(tmp_path / dense, 2, tokens=True, trainer=trainer(dense, **own)) for dense in ("sharded", "replicated")]
    assert_close(*runs)
    penalties = [steps(run, "batch_penalty") for run in runs]
    assert min(penalties[1]) > 0 and penalties[0] == pytest.approx(penalties[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adagrad", "rmsprop"])
def test_other_optimizers_take_parts_too(name: str, tmp_path: Path) -> None:
    own = {"optimizer": {"name": name, "learning_rate": 0.01}, "clip_norm": None}
    assert_close(*(Launched(tmp_path / dense, 2, trainer=trainer(dense, **own)) for dense in ("sharded", "replicated")))


@pytest.mark.slow
def test_a_lost_process_is_replaced_and_the_run_ends_the_same_to_the_bit(sharded: Launched, tmp_path: Path) -> None:
    run = Launched(tmp_path, 2, restarts=1, trainer=trainer("sharded"), faults=[{"what": "kill", "rank": 1, "at": 6, "attempt": 0}])
    assert "exitcode: -9" in run.log or "Signal 9" in run.log
    assert run.status == 0, run.log[-4000:]
    assert all(torch.equal(tensor, sharded.weights[name]) for name, tensor in run.weights.items())
    assert run.result["rows"] == sharded.result["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["sharded 2, replicated 3, sharded 1", "replicated 2, sharded 3, replicated 1", "sharded 2, sharded 3"])
def test_a_checkpoint_of_parts_or_copies_goes_on_in_any_number_of_either(parts: str, replicated: Launched, tmp_path: Path) -> None:
    chain = [part.split() for part in parts.split(", ")]
    for number, (dense, world) in enumerate(chain[:-1]):
        killed = Launched(tmp_path, int(world), trainer=trainer(dense), faults=[{"what": "kill", "rank": 1, "at": 7 * (number + 1)}])
        assert killed.status != 0
        assert not (tmp_path / "result.json").exists()
    dense, world = chain[-1]
    last = Launched(tmp_path, int(world), trainer=trainer(dense))
    assert last.status == 0, last.log[-4000:]
    for name, weight in replicated.weights.items():
        torch.testing.assert_close(last.weights[name], weight, **CLOSE, msg=name)
    for mine, theirs in zip(last.result["rows"], replicated.result["rows"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("poison", "step 3: left out: labels: task 'click', row 0: expected 0, 1 or NaN, got inf"),
        ("overflow", "step 3: the loss is"),
        ("spoil", "step 3: tables have taken a gradient that is not finite: back to step 0"),
    ],
)
def test_a_step_is_left_out_as_with_copies(what: str, told: str, tmp_path: Path) -> None:
    """A bad batch, found before the forward pass; a loss, behind it; a gradient, behind the backward pass."""
    faults = [{"what": what, "rank": 1, "at": 3}]
    runs = [Launched(tmp_path / dense, 2, trainer=trainer(dense), faults=faults) for dense in ("sharded", "replicated")]
    for run in runs:
        assert run.status == 0, run.log[-4000:]
        assert told in run.log and run.result["skipped"] == 1
        assert all(bool(weight.isfinite().all()) for weight in run.weights.values())
    assert_close(*runs)


def said(folder: Path, world: int, kind: str, dense: str) -> list[dict[str, Any]]:
    """What each process of `counted` said."""
    folder.mkdir()
    line = command([str(COUNTED), str(folder), kind, dense], world)
    done = subprocess.run(line, env={**environment(), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("ranker", 2), ("ranker", 3), ("retriever", 2), ("retriever", 3)])
def test_a_process_holds_its_share_of_parameters_gradients_and_state(kind: str, world: int, tmp_path: Path) -> None:
    """Adam has two numbers for each parameter. A share is at most a row more of each parameter than its N-th, where N does not divide."""
    parts, copies = said(tmp_path / "parts", world, kind, "sharded"), said(tmp_path / "copies", world, kind, "replicated")
    shapes = list(parts[0]["shapes"].values())
    total, most = sum(map(math.prod, shapes)), sum(-(-rows // world) * math.prod(rest) for rows, *rest in shapes)
    assert all(one["parameters"] == one["gradients"] == total and one["state"] == 2 * total for one in copies)
    for name, each in (("parameters", 1), ("gradients", 1), ("state", 2)):
        assert sum(one[name] for one in parts) == each * total
        assert max(one[name] for one in parts) <= each * most < each * total
    for mine, theirs in zip(parts, copies, strict=True):
        assert mine["norm"] > counted.CLIP and mine["norm"] == pytest.approx(theirs["norm"], rel=1e-5)
        assert mine["clipped"] == pytest.approx(counted.CLIP, rel=1e-4) and theirs["clipped"] == pytest.approx(counted.CLIP, rel=1e-4)
        assert mine["losses"] == pytest.approx(theirs["losses"], abs=1e-5)


def test_blocks_are_the_layers_that_are_called() -> None:
    tokens = worker.tokens()
    found = blocks(tokens)
    names = {id(module): name for name, module in tokens.named_modules()}
    assert [names[id(module)] for module in found] == ["stack.blocks.0", "stack.blocks.1", "stack.blocks.2"]
    dcn = worker.model()
    assert blocks(dcn) == list(dcn.body.cross.layers)
    assert blocks(counted.retriever()) == [], "its layers are used by several methods"


def test_a_block_whose_weight_is_elsewhere_too_is_none() -> None:
    dcn = worker.model()
    first, second = dcn.body.cross.layers[0], dcn.body.cross.layers[1]
    second.up.weight = first.up.weight
    assert blocks(dcn) == []


def test_a_scalar_cannot_be_split() -> None:
    module = nn.Module()
    module.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ConfigError, match=r"distribution\.dense: temperature is a scalar, which cannot be sharded; expected 'replicated'"):
        DenseParts(module, torch.device("cpu"))
