# SPDX-License-Identifier: Apache-2.0
"""Finite scalar quantisation (FSQ, Mentzer et al., arXiv 2309.15505): each number is rounded to one of a few levels in a bounded box."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from recsys.core.errors import ConfigError, DataError

_EPSILON = 1e-3  # how much wider than its outermost levels the box is
_MOST_LEVELS = 1000  # beyond, the box is wider by half a step, and what lies in its corners would be rounded to no level
Form = Literal["tanh", "sigmoid"]


class FSQ(nn.Module):
    """Rounds d numbers to ``L_1 … L_d`` levels; their product is a codebook without parameters, of ``|C| = Π L_j`` codes.

    Two forms of the bound before the rounding:

    - ``tanh`` (Mentzer et al., with ``1 + ε`` and the exact inverse for the shift, as vector-quantize-pytorch has it):
      ``b = tanh(z + s) h - o`` with ``h = (L - 1)(1 + ε) / 2``, ``o`` one half for an even L and zero for an odd one, and
      ``s = artanh(o / h)``, so that zero stays zero. Levels are the integers ``-⌊L/2⌋ … ⌈L/2⌉ - 1``, given divided by ``⌊L/2⌋``.
    - ``sigmoid`` (RecGPT, arXiv 2506.06270): ``b = (L - 1) σ(z)``. Levels are ``0 … L - 1``, given as ``2 b / (L - 1) - 1``: symmetric.

    Gradients pass the rounding straight through, so that they are those of ``b``. Everything is computed in float32 at least, also
    under autocast, since in half precision neighbouring levels and indices fall together; indices are sums of integers.

    Args:
        levels: ``L_1 … L_d``, at least 2 each for ``sigmoid`` and 3 for ``tanh``, whose two levels would be -1 and 0, and at most 1,000.
        form: of the bound.

    Raises:
        ConfigError: no levels, too small or too large ones, or so many codes that an int64 cannot number them.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...], form: Form = "tanh") -> None:
        super().__init__()
        least, most = (3, _MOST_LEVELS) if form == "tanh" else (2, 1 << 20)
        if not levels or min(levels) < least or max(levels) > most:
            raise ConfigError(f"levels: expected one or more of {least} to {most} for the form {form!r}, got {list(levels)}")
        self.form, self.size = form, math.prod(levels)
        if self.size >= 1 << 63:
            raise ConfigError(f"levels: {list(levels)} make {self.size} codes, more than an int64 can number")
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        basis = [math.prod(levels[:j]) for j in range(len(levels))]
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """``[..., d]``: ``b``, of which rounding makes a level; finite for every finite z."""
        levels = self.levels.to(z.dtype)
        if self.form == "sigmoid":
            return (levels - 1) * z.sigmoid()
        half = (levels - 1) * ((1 + _EPSILON) / 2)
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).to(z.dtype)
        return (z + (offset / half).atanh()).tanh() * half - offset

    def normalised_bound(self, z: Tensor) -> Tensor:
        """``[..., d]``: `bound` on the scale of the levels that `forward` gives."""
        return self._normalise(self.bound(z))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise.

        Args:
            z: float ``[..., d]``.

        Returns:
            ``[..., d]`` the levels within [-1, 1], in the dtype of z, with the gradient of the bound; int64 ``[...]`` the codes.
        """
        with torch.autocast(z.device.type, enabled=False):
            wide = z.to(torch.promote_types(z.dtype, torch.float32))
            bounded = self.bound(wide)
            rounded = bounded.round()
            index = ((rounded.detach().long() + self._lowest()) * self.basis).sum(-1)
            straight = bounded + (rounded - bounded).detach()
            return self._normalise(straight).to(z.dtype), index

    def values(self, index: Tensor) -> Tensor:
        """float32 ``[..., d]``: the levels, within [-1, 1], of codes ``[...]``: the inverse of the numbering.

        Raises:
            DataError: a code is not one of 0 to ``size`` - 1.
        """
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.size:
            raise DataError(f"code: expected 0 to {self.size - 1}, got {int(index.min())} to {int(index.max())}")
        level = index.long()[..., None] // self.basis % self.levels - self._lowest()
        return self._normalise(level.float())

    def _lowest(self) -> Tensor:
        """What makes the lowest level 0."""
        return self.levels // 2 if self.form == "tanh" else torch.zeros_like(self.levels)

    def _normalise(self, level: Tensor) -> Tensor:
        if self.form == "tanh":
            return level / (self.levels // 2)
        return level * (2 / (self.levels - 1)) - 1
