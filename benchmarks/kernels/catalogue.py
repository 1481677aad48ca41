# SPDX-License-Identifier: Apache-2.0
"""The loss over a catalogue of a million items beside the plain one, values and gradients: its time, and the memory that it holds.

The plain loss is that of PyTorch on all logits. Memory is what torch's record of allocations shows at its most, beyond states and items.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.frame import Check, ratio
from kernels.catalogue_loss import weighted_log_partition
from kernels.op import Shape
from kernels.testing import error_ratio, most_held

SHAPE: Shape = (512, 1_000_000, 64)
QUICK: Shape = (512, 200_000, 64)
TIME, MEMORY = 1.2, 0.1
ALIKE = 1e-5  # relative RMS difference of the gradients


Calls = Mapping[str, Callable[[], Any]]


def compared(*, quick: bool, timed: Callable[[Calls, int], Mapping[str, Sequence[float]]]) -> tuple[dict[str, Any], list[Check]]:
    """A row and the two checks.

    Args:
        quick: at a fifth of the items.
        timed: seconds of each call, in so many turns.

    Raises:
        RuntimeError: the losses or their gradients differ.
    """
    states, items, targets = _drawn(QUICK if quick else SHAPE)
    calls = {"op": lambda: _gradients(_ours, states, items, targets), "plain": lambda: _gradients(_plain, states, items, targets)}
    for found, expected in zip(calls["op"](), calls["plain"](), strict=True):
        if not error_ratio(found, expected) <= ALIKE:
            raise RuntimeError(f"catalogue loss: differs from the plain one by {error_ratio(found, expected):.1e}, expected {ALIKE:.0e}")
    seconds = timed(calls, 5)
    slower, memory = ratio(seconds["op"], seconds["plain"]), most_held(calls["op"]) / most_held(calls["plain"])
    shape = " ".join(map(str, (len(states), 1, *items.shape)))
    row = {"op": "catalogue loss, targets included", "shape": shape, "ms": 1e3 * sorted(seconds["op"])[2]}
    row["eager / op"] = str(ratio(seconds["plain"], seconds["op"]))
    note = f"{shape}, of the plain loss"
    return row, [
        slower.at_most("catalogue_loss_time", TIME),
        Check("catalogue_loss_memory", round(memory, 4), at_most=MEMORY, note=note),
    ]


def _drawn(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    count, catalogue, width = shape
    generator = torch.Generator().manual_seed(0)
    states, items = (torch.randn(n, width, generator=generator).div_(width**0.25).requires_grad_() for n in (count, catalogue))
    return states, items, torch.randint(0, catalogue, (count,), generator=generator)


def _gradients(loss: Callable[[Tensor, Tensor, Tensor], Tensor], states: Tensor, items: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    value = loss(states, items, targets)
    return value.detach(), *torch.autograd.grad(value, (states, items))


def _plain(states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(states @ items.T, targets)


def _ours(states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    weights = states.new_full((len(states),), 1 / len(states))
    return weighted_log_partition(states[:, None], items[:, None], weights).sum() - (states * items[targets]).sum(1).mean()
