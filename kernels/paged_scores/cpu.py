# SPDX-License-Identifier: Apache-2.0
"""Paged scores on the CPU: some of a row's keys are copied together at a time, and multiplied with its queries where they lie."""

from itertools import pairwise

import torch
from torch import Tensor

_ELEMENTS = 1 << 18  # of keys that are copied at a time: what stays in a core's cache


def forward(q: Tensor, pages: Tensor, slots: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """``[H, S]``.

    Raises:
        RuntimeError: on the CPU, a slot beyond the pool, or offsets that do not divide the slots into rows.
    """
    (rows, heads, width), key_heads = q.shape, pages.shape[1]
    bounds = offsets.tolist()
    if slots.device.type == "cpu":
        check(pages, slots, bounds)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.empty(key_heads, heads // key_heads, len(slots), dtype=dtype, device=q.device)
    grouped = q.to(wide).unflatten(1, (key_heads, -1))
    step = max(1, _ELEMENTS // (key_heads * width))
    missing = slots < 0
    some_missing = bool(missing.any())
    places = slots.clamp(min=0) if some_missing else slots
    for row in range(rows):
        for begin in range(bounds[row], bounds[row + 1], step):
            part = slice(begin, min(begin + step, bounds[row + 1]))
            keys = pages.index_select(0, places[part]).to(wide) if len(pages) else grouped.new_zeros(part.stop - begin, *pages.shape[1:])
            scores[:, :, part] = grouped[row] @ keys.permute(1, 2, 0)
    if some_missing:
        scores.masked_fill_(missing, -torch.inf)
    return scores.flatten(0, 1)


def check(pages: Tensor, slots: Tensor, bounds: list[int]) -> None:
    """Look through slots and offsets.

    Raises:
        RuntimeError: a slot is beyond the pool, or the offsets do not divide the slots into rows.
    """
    if len(slots):
        low, high = (int(x) for x in slots.aminmax())
        if low < -1 or high >= len(pages):
            raise RuntimeError(f"slots: expected -1 to {len(pages) - 1}, got {low} to {high}")
    if bounds[0] != 0 or bounds[-1] != len(slots) or any(b < a for a, b in pairwise(bounds)):
        raise RuntimeError(f"offsets: expected not descending ones from 0 to {len(slots)}, got {bounds}")
