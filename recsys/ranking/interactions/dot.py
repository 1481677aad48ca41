# SPDX-License-Identifier: Apache-2.0
"""The dot products of DLRM (Naumov et al., arXiv 1906.00091)."""

import torch
from torch import Tensor

from recsys.ranking.part import Part


class DotInteraction(Part):
    """The dot products of all pairs of F vectors: ``triu(E Eᵀ, 1)``, row by row, ``[B, F, d] → [B, F (F − 1) / 2]``.

    The whole of ``E Eᵀ`` is computed: one batched product is faster than the half of it in pieces.

    Args:
        vectors: F.
        dim: d.

    Attributes:
        width: of the result.
    """

    index: Tensor

    def __init__(self, vectors: int, dim: int) -> None:
        super().__init__()
        self.vectors, self.dim = vectors, dim
        self.width = vectors * (vectors - 1) // 2
        row, column = torch.triu_indices(vectors, vectors, offset=1)
        self.register_buffer("index", row * vectors + column, persistent=False)

    @property
    def flops(self) -> int:
        """``2 F² d``."""
        return 2 * self.vectors**2 * self.dim

    def forward(self, e_bfd: Tensor) -> Tensor:
        """The dot products."""
        return torch.bmm(e_bfd, e_bfd.transpose(1, 2)).flatten(1).index_select(1, self.index)
