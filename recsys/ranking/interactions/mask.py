# SPDX-License-Identifier: Apache-2.0
"""The parts of MaskNet (Wang et al., arXiv 2102.07619)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recsys.ranking.mlp import mlp
from recsys.ranking.part import NORM_EPS, Part, linear_flops


class FieldNorm(nn.Module):
    """LN_EMB: LayerNorm over each field's vector, with gains and biases of its own (eqs. 8 and 9): ``[B, F, d] → [B, F, d]``.

    Args:
        fields: F.
        dim: d.
    """

    def __init__(self, fields: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(fields, dim))
        self.bias = nn.Parameter(torch.zeros(fields, dim))

    def forward(self, e_bfd: Tensor) -> Tensor:
        """The normalised vectors."""
        return functional.layer_norm(e_bfd, e_bfd.shape[2:], eps=NORM_EPS) * self.weight + self.bias


class MaskBlock(Part):
    """``relu(LN(W (x ⊙ mask)))`` with the instance-guided mask ``W_2 relu(W_1 v + β_1) + β_2`` (eqs. 5 and 11 to 14).

    v is always the embedding layer; x is that layer, normalised, or the output of the block before.

    Args:
        context: the width of v.
        dim: the width of x, and of the mask.
        width: of the result.
        reduction: r; the mask's hidden layer, the aggregation, is r times as wide as the mask.
    """

    def __init__(self, context: int, dim: int, width: int, reduction: float) -> None:
        super().__init__()
        self.mask = mlp((context, max(1, round(reduction * dim)), dim), activation=nn.ReLU)
        self.linear = nn.Linear(dim, width, bias=False)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    @property
    def flops(self) -> int:
        """Those of the linear layers."""
        return linear_flops(self)

    def forward(self, v_bc: Tensor, x_bd: Tensor) -> Tensor:
        """``[B, context], [B, dim] → [B, width]``."""
        return functional.relu(self.norm(self.linear(x_bd * self.mask(v_bc))))
