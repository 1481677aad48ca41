# SPDX-License-Identifier: Apache-2.0
"""The kernels' benchmark: rivals compute what the ops compute, and the checks look at each op's worst shape."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import FUSED, OVER_BEST, OVER_EAGER, TIES, Contest, catalogue, check_alike, checks, contest, once, shapes_of
from benchmarks.kernels.rivals import RIVALS
from kernels.op import Op
from kernels.registry import OPS
from kernels.roofline import page, row
from kernels.shapes import RECIPES
from kernels.tune import measured

BY_NAME = {op.name: op for op in OPS}


def test_every_op_has_a_rival() -> None:
    assert set(RIVALS) == set(BY_NAME)
    assert all("eager" in rivals for rivals in RIVALS.values())
    assert {*FUSED, *TIES} <= set(BY_NAME)


@pytest.mark.parametrize("shape", [1, 2, 3])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_rivals_compute_the_same(op: Op, shape: int) -> None:
    inputs = op.inputs(op.shapes[shape], torch.float32, torch.Generator().manual_seed(0))
    compared = slice(1, None) if op.name in TIES else slice(None)
    expected = once(op.call, inputs)()[compared]
    for name, rival in RIVALS[op.name].items():
        check_alike(name, once(rival, inputs)()[compared], expected)


def test_a_rival_that_computes_something_else_is_an_error() -> None:
    op = BY_NAME["rms_norm"]
    inputs = op.inputs(op.shapes[2], torch.float32, torch.Generator().manual_seed(0))
    expected = once(op.call, inputs)()
    with pytest.raises(RuntimeError, match=r"eager: result 0 differs from the op's by 1\.0e-02, expected at most 1e-04"):
        check_alike("eager", [expected[0] * 1.01, *expected[1:]], expected)


def test_the_checks_take_the_worst_shape_against_the_best_rival() -> None:
    ours = [1.0] * 5
    first = Contest("fsq", (1,), {"op": ours, "eager": [2.0] * 5, "compiled": [1.5] * 5}, {})
    second = Contest("fsq", (2,), {"op": ours, "eager": [1.2] * 5, "compiled": [3.0] * 5}, {})
    best, eager = checks([first, second])
    assert (first.best, second.best) == ("compiled", "eager")
    assert (best.name, best.value, best.at_least) == ("fsq_over_best", 1.2, OVER_BEST)
    assert (eager.name, eager.value, eager.at_least) == ("fsq_over_eager", 1.2, OVER_EAGER)


def test_a_contest_times_everyone_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.kernels.LEAST", 1e-6)
    found = contest(BY_NAME["rms_norm"], (8, 16), pairs=5)
    assert set(found.seconds) == {"op", "eager", "compiled"} and not found.failed
    assert all(len(seconds) == 5 and min(seconds) > 0 for seconds in found.seconds.values())


def test_the_catalogue_loss_is_compared_in_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "QUICK", (600, 40_000, 8))

    def timed(calls: dict[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
        assert set(calls) == {"op", "plain"}
        return {"op": [1.1] * pairs, "plain": [1.0] * pairs}

    row, (time, memory) = catalogue.compared(quick=True, timed=timed)
    assert (time.name, time.at_most, time.value) == ("catalogue_loss_time", 1.2, 1.1)
    assert (memory.name, memory.at_most, memory.holds) == ("catalogue_loss_memory", 0.1, True)
    assert row["shape"] == "600 1 40000 8" and row["ms"] == 1100


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_quick_shapes_are_some_of_the_others(op: Op) -> None:
    assert set(shapes_of(op, quick=True)) <= set(shapes_of(op, quick=False)) != set()


PAGE = (Path(__file__).parents[2] / "docs" / "kernels_roofline.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_roofline_page_is_as_written() -> None:
    assert PAGE.rstrip() == "\n".join(page()).rstrip()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_roofline_page_has_every_op(op: Op) -> None:
    """As written at the smallest shape, whose inputs are made fast."""
    part = PAGE.split(f"## {op.name}\n")[1].split("\n## ")[0]
    smallest = min(RECIPES[op.name], key=lambda shape: op.work(shape, torch.bfloat16).read)
    assert "| " + " | ".join(row(op, smallest)) + " |" in part
    assert part.count("\n| ") == len(RECIPES[op.name]) + 1


def test_kernels_are_within_twice_the_floor_where_they_take_longer_than_a_launch() -> None:
    assert "| 32768 256 | 0.117 | 83.9 | 1.4 | 25 | memory |" in PAGE  # 5 x 2^23 x 2 bytes at 3.35 TB/s
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ") and "µs" not in line]
    far = {shape for shape, _, _, _, floor, _, _, _, limit in rows if float(floor) >= 5 and float(limit) > 2}
    assert far == {"16 2048 256 64 7 3 0", "1 4 4 4096 4096 1 64 1024 64 64 1", "1 8 2 1024 8192 2 16 512 128 128 1"}


def test_tuning_names_a_way_for_every_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.tune.LEAST", 1e-6)
    monkeypatch.setattr("kernels.tune.MOST_BYTES", 1e4)
    found = dict(measured(BY_NAME["rms_norm"], torch.float32, "cpu"))
    assert found and set(found.values()) <= {"native", "cpu"}
