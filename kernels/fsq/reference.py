# SPDX-License-Identifier: Apache-2.0
"""Finite scalar quantisation (FSQ, Mentzer et al., arXiv 2309.15505): each number is rounded to one of a few levels in a bounded box.

Two forms of the bound b before the rounding, for L levels:

- ``tanh``: ``b = tanh(z + s) h - o`` with ``h = (L - 1)(1 + ε) / 2``, ``o`` one half for an even L and zero for an odd one, and
  ``s = artanh(o / h)``. Levels are ``-⌊L/2⌋ … ⌈L/2⌉ - 1``, given divided by ``⌊L/2⌋``.
- ``sigmoid`` (RecGPT, arXiv 2506.06270): ``b = (L - 1) σ(z)``. Levels are ``0 … L - 1``, given as ``2 b / (L - 1) - 1``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_EPSILON = 1e-3  # how much wider than its outermost levels the box is


def fsq(z: Tensor, levels: Sequence[int], form: str) -> tuple[Tensor, Tensor]:
    """The definition.

    Args:
        z: ``[M, K, d]``, float32, bfloat16, float16 or float64.
        levels: ``L_1 … L_d``.
        form: of the bound, ``tanh`` or ``sigmoid``.

    Returns:
        ``[M, K, d]`` the levels within [-1, 1] in the dtype of z, with the gradient of the bound, straight through the rounding; int64
        ``[M, K]`` the codes ``Σ_j level_j Π_{m<j} L_m``, levels counted from zero. Computed in float32 (float64 for float64).
    """
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    bounded = bound(wide, levels, form)
    rounded = bounded.round()
    lowest, basis = numbering(levels, form, z.device)
    index = ((rounded.detach().long() + lowest) * basis).sum(-1)
    straight = bounded + (rounded - bounded).detach()
    return normalised(straight, levels, form).to(z.dtype), index


def bound(z: Tensor, levels: Sequence[int], form: str) -> Tensor:
    """``[..., d]``: b."""
    if form == "sigmoid":
        return (torch.tensor(levels, device=z.device).to(z.dtype) - 1) * z.sigmoid()
    half, offset, shift = box(levels, z.dtype, z.device)
    return (z + shift).tanh() * half - offset


def box(levels: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """h, o and s of the form ``tanh``, ``[d]`` each."""
    counts = torch.tensor(levels, device=device)
    half = (counts.to(dtype) - 1) * ((1 + _EPSILON) / 2)
    offset = torch.where(counts % 2 == 0, 0.5, 0.0).to(dtype)
    return half, offset, (offset / half).atanh()


def normalised(level: Tensor, levels: Sequence[int], form: str) -> Tensor:
    """``[..., d]`` levels on the scale of [-1, 1]."""
    counts = torch.tensor(levels, device=level.device)
    return level / (counts // 2) if form == "tanh" else level * (2 / (counts - 1)) - 1


def numbering(levels: Sequence[int], form: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 ``[d]`` each: what makes the lowest level 0, and what a level is multiplied by."""
    counts = torch.tensor(levels, device=device)
    basis = torch.tensor([math.prod(levels[:j]) for j in range(len(levels))], device=device)
    return counts // 2 if form == "tanh" else torch.zeros_like(counts), basis
