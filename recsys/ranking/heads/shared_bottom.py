# SPDX-License-Identifier: Apache-2.0
"""One network for all tasks, then one tower per task."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.ranking.heads.base import Head
from recsys.ranking.mlp import mlp
from recsys.ranking.part import linear_flops


@register("head", "shared_bottom")
class SharedBottom(Head):
    """The shared-bottom model of multi-task learning (Caruana 1997), against which MMoE was measured: ``tower_k(f(x))``.

    The bottom ends with an activation, so that with one task it is one MLP of the bottom's and the tower's hidden layers.
    """

    class Config(BaseConfig):
        """Sizes.

        Attributes:
            bottom: widths of the shared layers, at least one.
            hidden: widths of each tower's hidden layers.
            dropout: after every hidden layer, shared or not.
        """

        name: Literal["shared_bottom"] = "shared_bottom"
        bottom: tuple[int, ...] = Field((64,), min_length=1)
        hidden: tuple[int, ...] = ()
        dropout: float = Field(0.0, ge=0, lt=1)

    def __init__(self, config: Config, dim: int, tasks: int) -> None:
        super().__init__(dim, tasks)
        self.bottom = trunk((dim, *config.bottom), config.dropout)
        widths = (config.bottom[-1], *config.hidden, 1)
        self.towers = nn.ModuleList(mlp(widths, dropout=config.dropout) for _ in range(tasks))

    @property
    def flops(self) -> int:
        """Those of the linear layers."""
        return linear_flops(self)

    def forward(self, x_bd: Tensor) -> Tensor:
        """Logits ``[B, tasks]``."""
        shared_be = self.bottom(x_bd)
        return torch.cat([tower(shared_be) for tower in self.towers], dim=1)


def trunk(widths: tuple[int, ...], dropout: float) -> nn.Sequential:
    """An MLP whose last layer is a hidden one: an activation, and dropout, after each."""
    return nn.Sequential(mlp(widths, dropout=dropout), nn.SiLU(), nn.Dropout(dropout))
