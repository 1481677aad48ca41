# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels multiply: a matrix for each token, by memory and strides, and whether one of its axes lies in parts."""

from typing import NamedTuple

from torch import Tensor

from kernels.tiles import together

VECTOR = 8  # numbers of two bytes that a thread moves at once


class Matrices(NamedTuple):
    """A matrix for each token, as kernels take it: its memory, the strides of tokens, rows, columns and parts, and a part's width or 0."""

    memory: Tensor
    strides: tuple[int, int, int, int]
    width: int = 0

    @property
    def transposed(self) -> "Matrices":
        """Columns for rows."""
        token, row, column, part = self.strides
        return self._replace(strides=(token, column, row, part))

    @property
    def outer(self) -> tuple[int, int, int]:
        """The strides where columns touch: of tokens, rows and parts."""
        token, row, _, part = self.strides
        return token, row, part


def matrices(x_tmn: Tensor) -> Matrices:
    """Of a tensor as it lies."""
    token, row, column = x_tmn.stride()
    return Matrices(x_tmn, (token, row, column, 0))


def token_rows(x: Tensor) -> Matrices:
    """Tokens of either form as ``[T, B, D]``; a single part is a whole token. What does not lie as the kernels want it is copied."""
    x = together(x)
    if x.ndim == 3 or x.shape[2] == 1:
        return Matrices(x, (x.stride(1), x.stride(0), 1, 0))
    if x.shape[3] % VECTOR == 0 and x.stride(1) % VECTOR:
        x = x.contiguous()
    return Matrices(x, (x.stride(1), x.stride(0), 1, x.stride(2)), x.shape[3])
