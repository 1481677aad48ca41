# SPDX-License-Identifier: Apache-2.0
"""The next batch is on its way while one is trained: the same training, whatever happens in between. On the CPU, where streams are none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys.core.config import validate
from recsys.core.errors import ConfigError
from recsys.core.files import read_json
from recsys.data.world import World
from recsys.training.parallel import Distribution, _pipelined
from recsys.training.tree import unpack
from tests.recsys.training.distributed import worker
from tests.recsys.training.distributed.test_together import TRAINER, Launched, assert_exactly_once

LONG = TRAINER | {"epochs": 3, "log_every": 1}  # 27 steps


def trainer(pipelined: str, **distribution: Any) -> dict[str, Any]:
    return LONG | {"distribution": {"pipelined": pipelined, **distribution}}


def steps(run: Launched) -> list[dict[str, float]]:
    """What every step recorded of the training itself."""
    lines = [json.loads(line) for line in (run.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    names = ("batch_loss", "batch_bce", "gradient_norm", "learning_rate")
    return [{name: line[name] for name in ("step", *names)} for line in lines if "batch_loss" in line]


def assert_equal(found: Launched, expected: Launched) -> None:
    """The same course to the bit."""
    assert found.status == 0, found.log[-4000:]
    assert steps(found) == steps(expected) and len(steps(found)) > 20
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in found.weights.items())
    assert found.result["rows"] == expected.result["rows"] and found.result["skipped"] == expected.result["skipped"]


def launched(
    folder: Path, pipelined: str, world: int = 2, restarts: int = 0, faults: tuple[dict[str, Any], ...] = (), **job: Any
) -> Launched:
    return Launched(folder, world, restarts, **({"trainer": trainer(pipelined)} | job), faults=faults)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Two processes, one batch after another."""
    run = launched(tmp_path_factory.mktemp("plain") / "run", "off")
    assert run.status == 0, run.log[-4000:]
    return run


def test_batches_ahead_train_as_one_after_another(plain: Launched, tmp_path: Path) -> None:
    """And the last batch of each epoch is among them."""
    run = launched(tmp_path, "on", loud=True)
    assert_equal(run, plain)
    assert all(f"Module '{name}' will be pipelined" in run.log for name in ("pooled.0", "unpooled.0"))
    assert [step["step"] for step in steps(run)] == list(range(1, 28))
    assert_exactly_once(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["table_wise", "row_wise"])
def test_both_placements_and_parts_of_the_rest(placement: str, tmp_path: Path) -> None:
    placements = {table.name: placement for table in worker.SPEC.tables}
    own = [trainer(choice, placements=placements, dense="sharded") for choice in ("on", "off")]
    first, second = (launched(tmp_path / str(number), "", 3, trainer=one) for number, one in enumerate(own))
    assert second.status == 0, second.log[-4000:]
    assert_equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("poison", "step 4: left out: labels: task 'click', row 0: expected 0, 1 or NaN, got inf"),
        ("overflow", "step 4: the loss is"),
        ("spoil", "step 4: tables have taken a gradient that is not finite: back to step"),
    ],
)
def test_a_step_is_left_out_by_all_and_touches_nothing(what: str, told: str, tmp_path: Path) -> None:
    faults = ({"what": what, "rank": 1, "at": 4},)
    found, expected = (launched(tmp_path / choice, choice, faults=faults) for choice in ("on", "off"))
    assert expected.status == 0, expected.log[-4000:]
    assert_equal(found, expected)
    assert told in found.log and told in expected.log and found.result["skipped"] == 1


@pytest.mark.slow
def test_a_bad_batch_at_either_end_of_an_epoch(tmp_path: Path) -> None:
    """The first has none before it, in whose time it could be looked at; the last has none behind it."""
    faults = ({"what": "poison", "rank": 0, "at": 1}, {"what": "poison", "rank": 1, "at": 9})
    found, expected = (launched(tmp_path / choice, choice, faults=faults) for choice in ("on", "off"))
    assert expected.status == 0, expected.log[-4000:]
    assert_equal(found, expected)
    assert found.result["skipped"] == 2


@pytest.mark.slow
def test_a_lost_process_repeats_and_loses_no_batch(plain: Launched, tmp_path: Path) -> None:
    run = launched(tmp_path, "on", restarts=1, faults=({"what": "kill", "rank": 1, "at": 7, "attempt": 0},))
    assert "exitcode: -9" in run.log or "Signal 9" in run.log
    assert run.status == 0, run.log[-4000:]
    assert all(torch.equal(tensor, plain.weights[name]) for name, tensor in run.weights.items())
    assert_exactly_once(tmp_path)


@pytest.mark.slow
def test_a_saved_cursor_is_that_of_the_batches_trained(plain: Launched, tmp_path: Path) -> None:
    """SIGTERM comes as the sixth batch is taken, which is before the fifth is trained."""
    asked = launched(tmp_path, "on", faults=({"what": "term", "rank": 1, "at": 6},))
    assert asked.status != 0
    saved = tmp_path / "run" / "checkpoints" / "step-5"
    assert (saved / "MANIFEST.json").exists()
    assert unpack(read_json(saved / "loader.json"), {}) == {"epoch": 0, "samples": 5 * 12}
    assert_equal(launched(tmp_path, "on"), plain)
    assert_exactly_once(tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_with_and_without_batches_ahead(plain: Launched, tmp_path: Path) -> None:
    killed = launched(tmp_path, "on", faults=({"what": "kill", "rank": 0, "at": 7},))
    assert killed.status != 0
    assert_equal(launched(tmp_path, "off"), plain)
    assert_exactly_once(tmp_path)


@pytest.mark.parametrize(
    ("choice", "managed", "device", "size", "expected"),
    [
        ("auto", False, "cuda", 2, True),
        ("auto", False, "cuda", 1, False),
        ("auto", False, "cpu", 2, False),
        ("auto", True, "cuda", 2, False),
        ("on", False, "cpu", 1, True),
        ("off", False, "cuda", 2, False),
    ],
)
def test_when_batches_are_taken_ahead(choice: str, managed: bool, device: str, size: int, expected: bool) -> None:
    distribution = validate(Distribution, {"pipelined": choice})
    assert _pipelined(distribution, worker.model(managed=managed), torch.device(device), World(0, size)) is expected


def test_what_cannot_be_asked_ahead_is_told() -> None:
    on = validate(Distribution, {"pipelined": "on"})
    with pytest.raises(ConfigError, match="'auto' or 'off', got 'on': the ids of table 'item' are managed"):
        _pipelined(on, worker.model(managed=True), torch.device("cpu"), World(0, 2))
    with pytest.raises(ConfigError, match="the model has no tables"):
        _pipelined(on, torch.nn.Linear(2, 2), torch.device("cpu"), World(0, 2))
