# SPDX-License-Identifier: Apache-2.0
"""From tokens to one logit per task, and the loss on it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from recsys.ranking.blocks import NORM_EPS
from recsys.ranking.mlp import mlp


class TaskTowers(nn.Module):
    """One MLP per task on a shared vector: ``[B, D] → [B, tasks]``.

    Args:
        dim: D.
        tasks: how many.
        hidden: widths of each tower's hidden layers.
        dropout: after each hidden layer.
    """

    def __init__(self, dim: int, tasks: int, hidden: Sequence[int] = (), dropout: float = 0.0) -> None:
        super().__init__()
        self.towers = nn.ModuleList(mlp((dim, *hidden, 1), dropout=dropout) for _ in range(tasks))

    def forward(self, x_bd: Tensor) -> Tensor:
        """Logits."""
        return torch.cat([tower(x_bd) for tower in self.towers], dim=1)


class MeanReadout(nn.Module):
    """Final norm, mean over tokens, task towers: ``[B, T, D] → [B, tasks]``.

    The papers state the mean and the towers. The norm is ours: a pre-norm stack leaves its stream unnormalised, and each inter-layer
    residual about doubles it.

    Args:
        dim: D.
        tasks: how many.
        hidden: widths of each tower's hidden layers.
        dropout: in the towers.
    """

    def __init__(self, dim: int, tasks: int, hidden: Sequence[int] = (), dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.towers = TaskTowers(dim, tasks, hidden, dropout)

    def forward(self, x_btd: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.towers(self.norm(x_btd).mean(dim=1))
        return logits


def masked_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy from logits: the mean over the observed labels of each task, then over the tasks that have any.

    Args:
        logits: ``[B, tasks]``.
        labels: ``[B, tasks]``, 0 to 1; NaN where unobserved.

    Returns:
        A scalar; zero where no label is observed.
    """
    observed = ~labels.isnan()
    entropy = functional.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0.0), reduction="none")
    count = observed.sum(dim=0)
    per_task = entropy.where(observed, 0.0).sum(dim=0) / count.clamp(min=1)
    return per_task.sum() / (count > 0).sum().clamp(min=1)
