# SPDX-License-Identifier: Apache-2.0
"""One step of beam search on the CPU by a loop in C++ over each user's own children."""

from pathlib import Path

import torch
from torch import Tensor

from kernels import native
from kernels.constrained_step.reference import Given, Step, empty_step

_SOURCE = Path(__file__).with_name("cpu.cpp")
_WRONG = {
    1: "nodes: a beam stands at no node of first_child, or its children are not among those of code_of",
    2: "code_of: a child's code has no log-probability",
}


def supports(log_probs: Tensor, scores: Tensor, _: int) -> bool:
    """Whether numbers are of at most 32 bits, and there is a compiler."""
    return torch.float64 not in (log_probs.dtype, scores.dtype) and native.load(_SOURCE) is not None


def forward(given: Given, width: int, children: int | None, renormalise: bool) -> Step:
    """See `kernels.constrained_step.constrained_step`.

    Raises:
        RuntimeError: a live beam stands at no node, or a child's code has no log-probability.
    """
    values = given.log_probs.float()
    values = values if values.stride(2) == 1 else values.contiguous()  # users and beams may share rows
    scores = given.scores.float().contiguous()
    nodes, first_child, code_of = (one.contiguous() for one in (given.nodes, given.first_child, given.code_of))
    masks = [None if one is None else one.contiguous() for one in (given.alive, given.closed_offsets, given.closed)]
    found = empty_step(nodes, scores, width)
    status = native.call(
        _SOURCE, "constrained_step", values, values.stride(0), values.stride(1), values.shape[2], nodes, scores, *nodes.shape,
        first_child, len(first_child) - 1, code_of, len(code_of), *masks, width, children or 0, int(renormalise),
        torch.get_num_threads(), *found,
    )  # fmt: skip
    if status:
        raise RuntimeError(_WRONG[status])
    return found._replace(scores=found.scores.to(given.scores.dtype))
