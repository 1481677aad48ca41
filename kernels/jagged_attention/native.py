# SPDX-License-Identifier: Apache-2.0
"""Jagged attention on the CPU by a loop in C++ over rows and heads, without padding; see ``cpu.cpp``."""

from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from kernels import native
from kernels.jagged_attention.cpu import Rule
from kernels.jagged_attention.reference import Mask

_SOURCE = Path(__file__).with_name("cpu.cpp")
_PARTS = 64  # shares of the bias's gradient, each of every so manieth row, summed in order


def supports(q: Tensor) -> bool:
    """Whether the tokens are float32 or less, and there is a compiler."""
    return q.dtype != torch.float64 and native.load(_SOURCE) is not None


def forward(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """``[S, H, e]`` each → ``[S, H, e]``, and the log-sum-exp ``[H, S]`` of the scores in float32, ``[0]`` for the SiLU form."""
    wide = _wide(q, k, v)
    table, settings = _settings(q, offsets, bias, rule)
    y = torch.empty_like(wide[0])
    lse = y.new_empty((q.shape[1], q.shape[0]) if rule.form == "softmax" else 0)
    native.call(_SOURCE, "jagged_attention", *wide, offsets, table, *settings, torch.get_num_threads(), y, lse)
    return y.to(q.dtype), lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Tensor | None, _: Tensor | None, lse: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v ``[S, H, e]`` and of the bias ``[H or 1, D]`` (``[0]`` without one)."""
    wide = _wide(dy, q, k, v)
    table, settings = _settings(q, offsets, bias, rule)
    found = [torch.empty_like(wide[1]) for _ in range(3)]
    rows, heads = len(offsets) - 1, q.shape[1]
    shares = None if bias is None else wide[1].new_empty(min(rows, _PARTS), heads, bias.shape[1])
    arguments = (*wide, offsets, table, lse, *settings, torch.get_num_threads(), *found, shares, _PARTS)
    native.call(_SOURCE, "jagged_attention_backward", *arguments)
    dq, dk, dv = (x.to(q.dtype) for x in found)
    if bias is None or shares is None:
        return dq, dk, dv, q.new_empty(0)
    dbias_hd = shares.sum(0)
    return dq, dk, dv, (dbias_hd if len(bias) > 1 else dbias_hd.sum(0, keepdim=True)).to(bias.dtype)


def _wide(*given: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.float().contiguous() for x in given)


def _settings(q: Tensor, offsets: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor | None, tuple[int | float | Tensor | None, ...]]:
    """The bias's numbers, and the sizes and the rule as the loop takes them."""
    table = None if bias is None else bias.float().contiguous()
    biases, distances = (1, 1) if bias is None else bias.shape
    how = (int(rule.form == "softmax"), get_args(Mask).index(rule.mask), rule.group, float(rule.divisor), rule.seen)
    return table, (len(offsets) - 1, *q.shape[1:], biases, distances, *how)
