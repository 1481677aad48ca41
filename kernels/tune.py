# SPDX-License-Identifier: Apache-2.0
"""Measure which implementation of each op is the fastest on this machine, and write it into ``kernels/paths.json``.

    make tune

Implementations are timed in turns at the recipes' shapes and at smaller ones of the tests, forward and backward; of those in the same
bucket of sizes the last one counts, which is the largest. Entries of other devices stay, and the table is written after each op. It is
committed: what runs never depends on a measurement at run time.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kernels import backend, paths
from kernels.op import Op, Shape, forward_backward
from kernels.registry import OPS
from kernels.shapes import RECIPES

ROUNDS = 7
LEAST = 0.02  # seconds of one measurement
MOST_FLOPS, MOST_BYTES = 3e10, 1e9  # of a shape
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
WAYS: dict[str, tuple[backend.Backend, ...]] = {"cpu": ("native", "cpu"), "cuda": ("triton",)}


def shapes_of(op: Op) -> list[Shape]:
    """Those that a machine like this takes in a moment, the smallest first."""
    works = {shape: op.work(shape, torch.float32) for shape in (*op.shapes, *RECIPES[op.name])}
    taken = [shape for shape, work in works.items() if work.flops <= MOST_FLOPS and work.read + work.written <= MOST_BYTES]
    return sorted(taken, key=lambda shape: works[shape].read)


def measured(op: Op, dtype: torch.dtype, device: str) -> Iterator[tuple[int, backend.Backend]]:
    """For each shape its bucket and the fastest way there."""
    for shape in shapes_of(op):
        given = op.inputs(shape, dtype, torch.Generator().manual_seed(0))
        inputs = tuple(i.detach().to(device).requires_grad_(i.requires_grad) if isinstance(i, Tensor) else i for i in given)
        seconds = {way: _seconds(op, inputs, way) for way in _different(op, inputs, device)}
        yield paths.bucket(inputs[0].numel()), min(seconds, key=lambda way: seconds[way])


def _different(op: Op, inputs: tuple[Any, ...], device: str) -> list[backend.Backend]:
    """The ways that there are for these inputs: one that falls to another is left out."""
    found = []
    for way in WAYS[device]:
        with backend.use(way), backend.record() as ran:
            forward_backward(op.call, inputs)
        if any(choice.backend == way for choice in ran):
            found.append(way)
    return found or ["cpu"]


def _seconds(op: Op, inputs: tuple[Any, ...], way: backend.Backend) -> float:
    with backend.use(way):
        once = _timed(lambda: forward_backward(op.call, inputs), 1)
        repeats = max(1, round(LEAST / once))
        return statistics.median(_timed(lambda: forward_backward(op.call, inputs), repeats) for _ in range(ROUNDS))


def _timed(call: Callable[[], Any], repeats: int) -> float:
    started = perf_counter()
    for _ in range(repeats):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (perf_counter() - started) / repeats


def main() -> None:
    """Measure all ops, and write the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table: dict[str, Any] = json.loads(paths.FILE.read_text(encoding="utf-8"))
    known: dict[str, Any] = table.get(device, {})
    found: dict[str, dict[str, dict[str, str]]] = {}
    for op in OPS:
        folder = op.call.__module__.split(".")[1]
        if folder in found:  # ops of one folder share its rows
            continue
        for dtype in DTYPES[device]:
            buckets = {str(bucket): way for bucket, way in measured(op, dtype, device)}
            found.setdefault(folder, {})[str(dtype).removeprefix("torch.")] = dict(sorted(buckets.items(), key=lambda one: int(one[0])))
            print(f"{op.name} {dtype}: {buckets}", flush=True)
        beside = paths.FILE.with_suffix(".tmp")
        beside.write_text(json.dumps(table | {device: known | found}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        beside.replace(paths.FILE)


if __name__ == "__main__":
    main()
