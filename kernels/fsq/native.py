# SPDX-License-Identifier: Apache-2.0
"""FSQ on the CPU by a loop in C++ after PyTorch's tanh or sigmoid, whose bits decide on which side of a tie a number falls."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import native
from kernels.fsq.reference import box, numbering

_SOURCE = Path(__file__).with_name("cpu.cpp")
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Box(NamedTuple):
    """By dimension: the bound is ``t · half - offset`` of the squashed ``z + shift``, its value ``/ scale`` or ``· scale - 1``."""

    half: Tensor
    offset: Tensor
    shift: Tensor
    scale: Tensor
    slope: Tensor  # of the value by the squashed number
    lowest: Tensor
    basis: Tensor


@cache
def _box(levels: tuple[int, ...], form: str) -> _Box:
    cpu = torch.device("cpu")
    counts, numbers = torch.tensor(levels), numbering(levels, form, cpu)
    if form == "sigmoid":
        half, none, scale = counts.float() - 1, torch.zeros(len(levels)), 2 / (counts - 1)
        return _Box(half, none, none, scale, scale * half, *numbers)
    half, offset, shift = box(levels, torch.float32, cpu)
    scale = (counts // 2).float()
    return _Box(half, offset, shift, scale, half / scale, *numbers)


def supports(z: Tensor) -> bool:
    """Whether there is a loop for the dtype of ``z``, and a compiler for it."""
    return z.dtype in _NAMES and native.load(_SOURCE) is not None


def forward(z: Tensor, levels: Sequence[int], form: str) -> tuple[Tensor, Tensor]:
    """``z [M, K, d]`` → levels ``[M, K, d]`` within [-1, 1], in the dtype of z, and codes int64 ``[M, K]``."""
    own = _box(tuple(levels), form)
    values, codes = torch.empty_like(z), z.new_empty(z.shape[:-1], dtype=torch.int64)
    arguments = (_squashed(z, own, form), values, codes, codes.numel(), len(levels), own.half, own.offset, own.scale, own.lowest, own.basis)
    native.call(_SOURCE, f"fsq_{_NAMES[z.dtype]}", *arguments, int(form == "tanh"), torch.get_num_threads())
    return values, codes


def backward(dy: Tensor, z: Tensor, levels: Sequence[int], form: str) -> Tensor:
    """The gradient of ``z [M, K, d]``: that of the bound on the scale of [-1, 1]."""
    own, dz = _box(tuple(levels), form), torch.empty_like(z)
    arguments = (dy, _squashed(z, own, form), dz, z.numel() // len(levels), len(levels), own.slope, int(form == "tanh"))
    native.call(_SOURCE, f"fsq_backward_{_NAMES[z.dtype]}", *arguments, torch.get_num_threads())
    return dz


def _squashed(z: Tensor, own: _Box, form: str) -> Tensor:
    return z.float().sigmoid() if form == "sigmoid" else (z.float() + own.shift).tanh_()
