# SPDX-License-Identifier: Apache-2.0
"""Paged scores on the CPU by a loop in C++, which reads each key once and copies none; see ``cpu.cpp``."""

from pathlib import Path

import torch
from torch import Tensor

from kernels import native
from kernels.paged_scores.cpu import check

_SOURCE = Path(__file__).with_name("cpu.cpp")
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def supports(q: Tensor, _: torch.dtype) -> bool:
    """Whether there is a loop for the dtype of ``q``, and a compiler for it."""
    return q.dtype in _NAMES and native.load(_SOURCE) is not None


def forward(q: Tensor, pages: Tensor, slots: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """``[H, S]``. A pool whose last axis does not lie together is copied.

    Raises:
        RuntimeError: a slot beyond the pool, or offsets that do not divide the slots into rows.
    """
    (rows, heads, width), (count, key_heads) = q.shape, pages.shape[:2]
    pages = pages if pages.stride(2) == 1 or width == 1 else pages.contiguous()
    sizes = torch.tensor((rows, heads, key_heads, width, count, len(slots), *pages.stride()[:2]), device=q.device)
    scores = q.new_empty(heads, len(slots), dtype=torch.float32)
    places = slots.contiguous(), int(slots.dtype == torch.int64), offsets.to(torch.int64).contiguous()
    arguments = (q.float().contiguous(), pages, *places, sizes, torch.get_num_threads(), scores)
    if native.call(_SOURCE, f"paged_scores_{_NAMES[q.dtype]}", *arguments):
        check(pages, slots, offsets.tolist())
    return scores.to(dtype)
