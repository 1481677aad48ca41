# SPDX-License-Identifier: Apache-2.0
"""The fusion of two streams in FinalMLP (Mao et al., arXiv 2304.00902)."""

import torch
from torch import Tensor, nn

from recsys.core.errors import ConfigError
from recsys.ranking.part import Part
from recsys.ranking.per_token import xavier_uniform_per_token_


class BilinearFusion(Part):
    """Multi-head bilinear fusion: for each task, ``b + w_1ᵀ o_1 + w_2ᵀ o_2 + Σ_h o_1[h]ᵀ W_h o_2[h]``.

    Both vectors are cut into heads of equal width, and each head of the one meets its fellow of the other. In the paper, whose b, w_1
    and w_2 stand in every head, they come to the same sum.

    Chosen where the paper is silent: one set of weights per task; Xavier-uniform ``W_h``, with the fans of one task.

    Args:
        first: P, the width of o_1.
        second: Q, the width of o_2.
        heads: a divisor of both.
        tasks: how many.

    Raises:
        ConfigError: ``heads`` does not divide both.
    """

    def __init__(self, first: int, second: int, heads: int, tasks: int) -> None:
        super().__init__()
        if first % heads or second % heads:
            raise ConfigError(f"heads: expected a divisor of the widths of both streams, {first} and {second}, got {heads}")
        self.widths, self.heads, self.tasks = (first, second), heads, tasks
        self.linear = nn.Linear(first + second, tasks)
        self.weight = nn.Parameter(torch.empty(heads, first // heads, tasks * (second // heads)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.linear.reset_parameters()
        xavier_uniform_per_token_(self.weight, self.widths[1] // self.heads)

    @property
    def flops(self) -> int:
        """``2 tasks (P + Q + P Q / heads)``. The last sum over o_2, ``2 tasks Q``, is not a matrix product and left out."""
        first, second = self.widths
        return 2 * self.tasks * (first + second + first * second // self.heads)

    def forward(self, x_bd: Tensor) -> Tensor:
        """``[B, P + Q] → [B, tasks]``: o_1 and o_2 stand one after the other."""
        first_hbp, second_hbq = (x.unflatten(1, (self.heads, -1)).transpose(0, 1) for x in x_bd.split(self.widths, dim=1))
        met_hbtq = torch.bmm(first_hbp, self.weight).unflatten(2, (self.tasks, -1)) * second_hbq[:, :, None]
        logits_bt: Tensor = self.linear(x_bd) + met_hbtq.sum(dim=(0, 3))
        return logits_bt
