# SPDX-License-Identifier: Apache-2.0
"""RMSNorm on the CPU by a loop in C++: each row is read from memory once each way."""

from pathlib import Path

import torch
from torch import Tensor

from kernels import native

_SOURCE = Path(__file__).with_name("cpu.cpp")
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_BLOCKS = 64  # of rows, whose shares of the gain's gradient are summed in order


def supports(x: Tensor) -> bool:
    """Whether there is a loop for the dtype of ``x``, and a compiler for it."""
    return x.dtype in _NAMES and native.load(_SOURCE) is not None


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x [M, N]`` → ``y [M, N]`` and the reciprocal root mean square ``[M]`` of each row."""
    y, scale = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    native.call(_SOURCE, f"rms_norm_{_NAMES[x.dtype]}", x, weight, y, scale, *x.shape, eps, torch.get_num_threads())
    return y, scale


def backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x [M, N]`` and of ``weight [N]``."""
    (rows, width), blocks = x.shape, min(len(x), _BLOCKS)
    dx, shares = torch.empty_like(x), x.new_empty(blocks, width, dtype=torch.float32)
    name, threads = f"rms_norm_backward_{_NAMES[x.dtype]}", torch.get_num_threads()
    native.call(_SOURCE, name, dy.contiguous(), x, weight, scale, dx, shares, rows, width, blocks, threads)
    return dx, shares.sum(0).to(weight.dtype)
