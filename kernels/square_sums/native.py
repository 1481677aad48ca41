# SPDX-License-Identifier: Apache-2.0
"""Sums of squares on the CPU by a loop in C++: each number is read from memory once each way, in the order in which x lies there."""

from pathlib import Path

import torch
from torch import Tensor

from kernels import native

_SOURCE = Path(__file__).with_name("cpu.cpp")
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def supports(x: Tensor) -> bool:
    """Whether there is a loop for the dtype of ``x``, and a compiler for it."""
    return x.dtype in _NAMES and native.load(_SOURCE) is not None


def forward(x: Tensor) -> Tensor:
    """``x [B, T, P, w]``, the last axis together, → ``[B, T, P]``, contiguous, in float32."""
    sums = x.new_empty(x.shape[:3], dtype=torch.float32)
    native.call(_SOURCE, f"square_sums_{_NAMES[x.dtype]}", x, sums, *x.shape, *x.stride()[:3], torch.get_num_threads())
    return sums


def backward(dsums: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x [B, T, P, w]``, which lies in memory as x does, given that of the sums ``[B, T, P]``."""
    dx = torch.empty_like(x)
    strides = *dsums.stride(), *x.stride()[:3], *dx.stride()[:3]
    native.call(_SOURCE, f"square_sums_backward_{_NAMES[x.dtype]}", dsums, x, dx, *x.shape, *strides, torch.get_num_threads())
    return dx
