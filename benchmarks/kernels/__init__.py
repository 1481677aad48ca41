# SPDX-License-Identifier: Apache-2.0
"""Every op on this machine's processor beside eager PyTorch, ``torch.compile`` and FBGEMM, in turns in one process.

Shapes are the recipes', as far as a processor can take them; time is that of a forward pass and, where the op has a gradient, of a
backward pass, in float32. A rival whose results differ is not timed: that is an error. For each shape the ratio is that of the best
rival, by its median, and the check takes the op's worst shape.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.frame import Check, Ratio, Result, ratio, threads
from benchmarks.kernels import catalogue
from benchmarks.kernels.rivals import RIVALS, Rival
from kernels.op import Op, Shape, forward_backward
from kernels.registry import OPS
from kernels.shapes import RECIPES
from kernels.testing import error_ratio
from recsys.core.memory import keep_freed_memory
from recsys.training.progress import track

THREADS = 2
MOST_FLOPS, MOST_BYTES = 1.5e11, 2e9  # of a shape that a processor is asked for
QUICK_FLOPS, QUICK_BYTES = 1e10, 5e8
ALIKE = 1e-4  # relative RMS difference of a rival's results
LEAST = 0.03  # seconds of one measurement
OVER_BEST, OVER_EAGER = 0.95, 1.5
# Where fusion saves memory traffic; the others are one pass over their input either way, or a library's own kernel.
FUSED = ("jagged_attention", "catalogue_log_partition", "gather_topk", "constrained_step", "log_sinkhorn", "token_swiglu", "fsq")
TIES = ("gather_topk",)  # of equal scores a rival may give others, so that scores alone are compared


@dataclass(frozen=True)
class Contest:
    """The seconds of every run at a shape, by who ran; ours is ``op``.

    Attributes:
        op: whose.
        shape: where.
        seconds: by name.
        failed: why a rival did not run, by name.
    """

    op: str
    shape: Shape
    seconds: Mapping[str, Sequence[float]]
    failed: Mapping[str, str]

    def over(self, rival: str) -> Ratio:
        """Their seconds over ours."""
        return ratio(self.seconds[rival], self.seconds["op"])

    def median_over(self, rival: str) -> float:
        """The median over pairs of their seconds over ours."""
        return statistics.median(theirs / ours for theirs, ours in zip(self.seconds[rival], self.seconds["op"], strict=True))

    @property
    def best(self) -> str:
        """The fastest rival."""
        return min((name for name in self.seconds if name != "op"), key=lambda name: statistics.median(self.seconds[name]))


def run(*, quick: bool) -> Result:
    """Run the benchmark; freed memory is kept, as in a training."""
    keep_freed_memory()
    with threads(THREADS):
        # The largest tensors first, while the memory of the process is in one piece.
        row, of_catalogue = catalogue.compared(quick=quick, timed=in_turns)
        contests = [
            contest(op, shape, pairs=5 if quick else 15)
            for op, shape in track([(op, shape) for op in OPS for shape in shapes_of(op, quick=quick)], "ops by shape")
        ]
    rows = [*(_row(own) for own in contests), row]
    return Result("kernels", rows, [*checks(contests), *of_catalogue], {"threads": THREADS, "seconds": _details(contests)})


def shapes_of(op: Op, *, quick: bool) -> list[Shape]:
    """The recipes' shapes that a processor can take, at least one."""
    flops, most = (QUICK_FLOPS, QUICK_BYTES) if quick else (MOST_FLOPS, MOST_BYTES)
    works = {shape: op.work(shape, torch.float32) for shape in RECIPES[op.name]}
    return [shape for shape, work in works.items() if work.flops <= flops and work.read + work.written <= most] or [
        min(works, key=lambda shape: works[shape].flops)
    ]


def contest(op: Op, shape: Shape, pairs: int) -> Contest:
    """Time an op and its rivals in turns."""
    inputs = op.inputs(shape, torch.float32, torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    rivals: dict[str, Rival] = dict(RIVALS[op.name])
    rivals["compiled"] = torch.compile(rivals["eager"], dynamic=False)
    ours = once(op.call, inputs)
    expected = ours()
    runs, failed = {"op": ours}, {}
    for name, rival in rivals.items():
        own = once(rival, inputs)
        try:
            found = own()
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            failed[name] = type(error).__name__
            continue
        compared = slice(1, None) if op.name in TIES else slice(None)
        check_alike(f"{op.name} {shape}: {name}", found[compared], expected[compared])
        runs[name] = own
    return Contest(op.name, shape, in_turns(runs, pairs), failed)


def once(call: Rival, inputs: tuple[Any, ...]) -> Callable[[], list[Tensor]]:
    """A function that runs a call and, where it has a gradient, its backward pass, and returns results and gradients."""

    def run() -> list[Tensor]:
        values, gradients = forward_backward(call, inputs)
        return [*values, *gradients]

    return run


def check_alike(what: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Hold that a rival computes the same.

    Raises:
        RuntimeError: it does not.
    """
    for place, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
        error = error_ratio(theirs, ours) if ours.is_floating_point() else float(not torch.equal(theirs, ours))
        if not error <= ALIKE:
            raise RuntimeError(f"{what}: result {place} differs from the op's by {error:.1e}, expected at most {ALIKE:.0e}")


def in_turns(runs: Mapping[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    """Seconds of each, measured in turns; each measurement is of as many runs as the first one's take `LEAST` seconds."""
    started = perf_counter()
    for call in runs.values():
        call()
    slowest = (perf_counter() - started) / len(runs)
    repeats = max(1, min(1000, round(LEAST / max(slowest, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(pairs):
        for name, call in runs.items():
            started = perf_counter()
            for _ in range(repeats):
                call()
            seconds[name].append((perf_counter() - started) / repeats)
    return seconds


def checks(contests: Sequence[Contest]) -> list[Check]:
    """The targets, each op's at its worst shape."""
    found = []
    for op in dict.fromkeys(own.op for own in contests):
        own = [one for one in contests if one.op == op]
        worst = min(own, key=lambda one: one.median_over(one.best))
        note = f"{worst.best}, {worst.shape}: {worst.over(worst.best)}"
        found.append(Check(f"{op}_over_best", round(worst.median_over(worst.best), 3), at_least=OVER_BEST, note=note))
        if op in FUSED:
            worst = min(own, key=lambda one: one.median_over("eager"))
            note = f"{worst.shape}: {worst.over('eager')}"
            found.append(Check(f"{op}_over_eager", round(worst.median_over("eager"), 3), at_least=OVER_EAGER, note=note))
    return found


def _row(own: Contest) -> dict[str, Any]:
    row: dict[str, Any] = {"op": own.op, "shape": " ".join(map(str, own.shape)), "ms": 1e3 * statistics.median(own.seconds["op"])}
    for name in ("eager", "compiled", "fbgemm"):
        row[f"{name} / op"] = str(own.over(name)) if name in own.seconds else own.failed.get(name, "")
    return row


def _details(contests: Sequence[Contest]) -> list[dict[str, Any]]:
    return [{"op": own.op, "shape": list(own.shape), "seconds": {name: list(s) for name, s in own.seconds.items()}} for own in contests]
