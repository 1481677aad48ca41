# SPDX-License-Identifier: Apache-2.0
"""Finite scalar quantisation (FSQ, Mentzer et al., arXiv 2309.15505): each number is rounded to one of a few levels in a bounded box."""

import math

import torch
from torch import Tensor, nn

from kernels.fsq import Form, check_levels, fsq
from kernels.fsq.reference import bound, normalised, numbering
from recsys.core.errors import ConfigError, DataError


class FSQ(nn.Module):
    """Rounds d numbers to ``L_1 … L_d`` levels; their product is a codebook without parameters, of ``|C| = Π L_j`` codes.

    The two forms of the bound before the rounding stand in `kernels.fsq.reference`: ``tanh`` (Mentzer et al., with ``1 + ε`` and the exact
    inverse for the shift, as vector-quantize-pytorch has it, so that zero stays zero) and ``sigmoid`` (RecGPT, arXiv 2506.06270).

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
    lowest: Tensor

    def __init__(self, levels: tuple[int, ...], form: Form = "tanh") -> None:
        super().__init__()
        try:
            check_levels(levels, form)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.form, self.size, self._levels = form, math.prod(levels), tuple(levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        lowest, basis = numbering(levels, form, torch.device("cpu"))
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("lowest", lowest, persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """``[..., d]``: ``b``, of which rounding makes a level; finite for every finite z."""
        return bound(z, self._levels, self.form)

    def normalised_bound(self, z: Tensor) -> Tensor:
        """``[..., d]``: `bound` on the scale of the levels that `forward` gives."""
        return normalised(self.bound(z), self._levels, self.form)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise, see `kernels.fsq.fsq`.

        Args:
            z: float ``[..., d]``.

        Returns:
            ``[..., d]`` the levels within [-1, 1], in the dtype of z, with the gradient of the bound; int64 ``[...]`` the codes.
        """
        return fsq(z, self._levels, self.form)

    def values(self, index: Tensor) -> Tensor:
        """float32 ``[..., d]``: the levels, within [-1, 1], of codes ``[...]``: the inverse of the numbering.

        Raises:
            DataError: a code is not one of 0 to ``size`` - 1.
        """
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.size:
            raise DataError(f"code: expected 0 to {self.size - 1}, got {int(index.min())} to {int(index.max())}")
        level = self.digits(index) - self.lowest
        return normalised(level.float(), self._levels, self.form)

    def digits(self, index: Tensor) -> Tensor:
        """int64 ``[..., d]``: which level, counted from 0, each number of the codes ``[...]`` has."""
        digits: Tensor = index.long()[..., None] // self.basis % self.levels
        return digits
