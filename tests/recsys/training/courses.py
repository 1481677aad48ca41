# SPDX-License-Identifier: Apache-2.0
"""The course of a training on one implementation of the kernels, to be compared with that on another."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from kernels import backend
from recsys.embedding.tables import dense_parameters

STEPS = 200
RATE = 1e-4  # faster, and few rows are learnt by heart, where rounding grows from step to step to anything
EPSILON = 1e-6  # gradients far below are rounding, which Adam would make steps of
TOLERANCE = 2e-3  # of the difference of two losses, in units of the first


def course(build: Callable[[], nn.Module], batches: Sequence[Any], asked: backend.Asked) -> tuple[list[float], set[backend.Choice]]:
    """What `STEPS` steps of Adam make of the task's loss, without what parts add to it, and which implementations ran."""
    torch.manual_seed(0)
    with backend.session(asked) as ran:
        model = build().train()
        optimizer = torch.optim.Adam(dense_parameters(model), lr=RATE, eps=EPSILON)
        losses = []
        for step in range(STEPS):
            optimizer.zero_grad()
            loss, parts = model.loss(batches[step % len(batches)])
            loss.backward()
            optimizer.step()
            losses.append(float(next(iter(parts.values()))))
    return losses, ran


def assert_same_course(build: Callable[[], nn.Module], batches: Sequence[Any]) -> set[backend.Choice]:
    """Hold that the kernels' own losses stay beside those of the references, and that both learn; returns what ran."""
    (ours, ran), (plain, _) = (course(build, batches, asked) for asked in ("auto", "reference"))
    assert sum(plain[-10:]) < sum(plain[:10]), "nothing was learnt, so that nothing is compared"
    worst = max(abs(a - b) for a, b in zip(ours, plain, strict=True)) / plain[0]
    assert worst < TOLERANCE, f"losses differ by {worst:.1e}"
    assert all(choice.backend != "reference" for choice in ran)
    return ran
