# SPDX-License-Identifier: Apache-2.0
"""`kernels.catalogue_loss.cpu` with what happens between its products in C++."""

from pathlib import Path

import torch
from torch import Tensor

from kernels import native
from kernels.catalogue_loss import cpu

_SOURCE = Path(__file__).with_name("cpu.cpp")


def supports(states: Tensor) -> bool:
    """Whether there is a loop for the dtype of ``states``, and a compiler for it."""
    return states.dtype != torch.float64 and native.load(_SOURCE) is not None


def at_once(states: Tensor, items: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.catalogue_loss.cpu.at_once`."""
    return cpu.at_once(states, items, weights, _below_top)


def statistics_of(states: Tensor, items: Tensor) -> Tensor:
    """See `kernels.catalogue_loss.cpu.statistics_of`."""
    return cpu.statistics_of(states, items, _below_top)


def backward(grad: Tensor, states: Tensor, items: Tensor, weights: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.catalogue_loss.cpu.backward`."""
    return cpu.backward(grad, states, items, weights, statistics, _below)


def _below_top(logits: Tensor) -> tuple[Tensor, Tensor]:
    top, total = logits.new_empty(len(logits)), logits.new_empty(len(logits))
    native.call(_SOURCE, "below_top", logits, top, total, *logits.shape, torch.get_num_threads())
    return top, total


def _below(logits: Tensor, top: Tensor) -> Tensor:
    native.call(_SOURCE, "below", logits, top.contiguous(), *logits.shape, torch.get_num_threads())
    return logits
