# SPDX-License-Identifier: Apache-2.0
"""The interface of heads: from one vector to one logit per task."""

from abc import abstractmethod

from torch import Tensor

from recsys.ranking.part import Part


class Head(Part):
    """``[B, D] → [B, tasks]`` logits. Built as ``cls(config, dim, tasks)`` and registered with ``@register("head", name)``.

    Args:
        dim: D.
        tasks: how many.
    """

    def __init__(self, dim: int, tasks: int) -> None:
        super().__init__()
        self.dim, self.tasks = dim, tasks

    @abstractmethod
    def forward(self, x_bd: Tensor) -> Tensor:
        """Logits."""
