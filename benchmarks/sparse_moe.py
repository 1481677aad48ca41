# SPDX-License-Identifier: Apache-2.0
"""What does a sparse per-token mixture of experts at 1:2 cost beside the dense SwiGLU of as many parameters?

One layer of each, B = 2048 rows of T = 16 tokens of width D = 256 and expansion 2, in one process, timed in turns. A training step is
forward, backward (to the input too) and Adam; inference is forward alone. Half of the experts' operations would be a ratio of 0.5; the
rest is routing, and products with fewer rows each.
"""

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.frame import Result, ratio
from recsys.ranking.per_token import PerToken, SparseMoE, SwiGLU
from recsys.training.progress import track

ROWS, TOKENS, DIM = 2048, 16, 256
THREADS = 2
DENSE = SwiGLU.Config(expansion=2.0)
SPARSE = {
    "1 + 3 of 8": SparseMoE.Config(expansion=2.0, experts=8, active=4),
    "1 + 1 of 4": SparseMoE.Config(expansion=2.0, experts=4, active=2, gate_norm="all"),
}
CHECKED = "1 + 3 of 8"  # the defaults of SparseMoE
BOUNDS = {"train_step": 0.65, "inference": 0.6}


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return _result(_seconds(5 if quick else 15))
    finally:
        torch.set_num_threads(before)


def _seconds(pairs: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every run, by what was done and by layer; one round of warm-up is not kept."""
    torch.manual_seed(0)
    layers = {"dense": SwiGLU(DENSE, TOKENS, DIM)} | {name: SparseMoE(config, TOKENS, DIM) for name, config in SPARSE.items()}
    x_btd = torch.randn(TOKENS, ROWS, DIM).transpose(0, 1)  # tokens-outermost in memory, as inside a stack
    contestants = {
        "train_step": {name: _train_step(layer, x_btd) for name, layer in layers.items()},
        "inference": {name: _inference(layer, x_btd) for name, layer in layers.items()},
    }
    seconds: dict[str, dict[str, list[float]]] = {what: {name: [] for name in layers} for what in contestants}
    for turn in track(range(pairs + 1), "in turns"):
        for what, calls in contestants.items():
            for name, call in calls.items():
                start = perf_counter()
                call()
                if turn:
                    seconds[what][name].append(perf_counter() - start)
    return seconds


def _train_step(layer: PerToken, x_btd: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-4)
    x_btd, target_btd = x_btd.detach().requires_grad_(), torch.randn_like(x_btd)

    def step() -> None:
        optimizer.zero_grad()
        x_btd.grad = None
        torch.autograd.backward(layer(x_btd), target_btd)
        optimizer.step()

    return step


def _inference(layer: PerToken, x_btd: Tensor) -> Callable[[], None]:
    def infer() -> None:
        with torch.inference_mode():
            layer(x_btd)

    return infer


def _result(seconds: dict[str, dict[str, list[float]]]) -> Result:
    ratios = {what: {name: ratio(times[name], times["dense"]) for name in SPARSE} for what, times in seconds.items()}
    rows: list[dict[str, Any]] = []
    for name in ("dense", *SPARSE):
        layer = SwiGLU(DENSE, TOKENS, DIM) if name == "dense" else SparseMoE(SPARSE[name], TOKENS, DIM)
        row: dict[str, Any] = {"layer": name, "parameters": sum(p.numel() for p in layer.parameters()), "MFLOP / row": layer.flops / 1e6}
        for what, times in seconds.items():
            row[f"{what}, ms"] = round(1e3 * statistics.median(times[name]), 1)
            row[f"{what} / dense"] = "" if name == "dense" else str(ratios[what][name])
        rows.append(row)
    checks = [ratios[what][CHECKED].at_most(what, bound) for what, bound in BOUNDS.items()]
    return Result("sparse_moe", rows, checks, {"seconds": seconds, "rows": ROWS, "tokens": TOKENS, "dim": DIM, "threads": THREADS})
