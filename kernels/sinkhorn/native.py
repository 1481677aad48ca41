# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn on the CPU by a loop in C++ that keeps a matrix in the cache through all iterations; duals as in `kernels.sinkhorn.cpu`."""

from pathlib import Path

import torch
from torch import Tensor

from kernels import native
from kernels.sinkhorn.reference import NEGLIGIBLE, scaled

_SOURCE = Path(__file__).with_name("cpu.cpp")


def supports(logits: Tensor) -> bool:
    """Whether the matrix is one of float32 or less, and there is a compiler."""
    return logits.dtype != torch.float64 and native.load(_SOURCE) is not None


def forward(logits: Tensor, temperature: Tensor, iterations: int, symmetric: bool, implicit: bool) -> tuple[Tensor, Tensor]:
    """``logits [G, n, n]`` → the matrices ``[G, n, n]``, in the dtype of ``logits``, and the duals."""
    a_gij = scaled(logits, temperature, symmetric).contiguous()
    y, duals = torch.empty_like(a_gij), a_gij.new_empty(len(logits), 1 if implicit else iterations, 2, logits.shape[-1])
    native.call(
        _SOURCE, "sinkhorn", a_gij, y, duals, *logits.shape[:2], iterations, int(implicit), NEGLIGIBLE, torch.get_num_threads()
    )  # fmt: skip
    return y.to(logits.dtype), duals


def backward(dy: Tensor, logits: Tensor, temperature: Tensor, duals: Tensor, iterations: int, symmetric: bool, implicit: bool) -> Tensor:
    """The gradient of ``logits [G, n, n]``: through every iteration, or implicit."""
    a_gij = scaled(logits, temperature, symmetric).contiguous()
    da_gij, wide = torch.empty_like(a_gij), dy.to(a_gij.dtype).contiguous()
    native.call(
        _SOURCE, "sinkhorn_backward", wide, a_gij, duals, da_gij, *logits.shape[:2], iterations, int(implicit), NEGLIGIBLE,
        torch.get_num_threads(),
    )  # fmt: skip
    if symmetric:
        da_gij = (da_gij + da_gij.mT) / 2
    return (da_gij / temperature).to(logits.dtype)
