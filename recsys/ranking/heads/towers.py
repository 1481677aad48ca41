# SPDX-License-Identifier: Apache-2.0
"""One tower per task."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.ranking.heads.base import Head
from recsys.ranking.mlp import mlp
from recsys.ranking.part import linear_flops


@register("head", "towers")
class Towers(Head):
    """One MLP per task on the shared vector. With one task and no hidden layer it is the plain output layer."""

    class Config(BaseConfig):
        """Widths of each tower's hidden layers (none by default), and dropout after each."""

        name: Literal["towers"] = "towers"
        hidden: tuple[int, ...] = ()
        dropout: float = Field(0.0, ge=0, lt=1)

    def __init__(self, config: Config, dim: int, tasks: int) -> None:
        super().__init__(dim, tasks)
        self.towers = nn.ModuleList(mlp((dim, *config.hidden, 1), dropout=config.dropout) for _ in range(tasks))

    @property
    def flops(self) -> int:
        """Those of the linear layers."""
        return linear_flops(self)

    def forward(self, x_bd: Tensor) -> Tensor:
        """Logits ``[B, tasks]``."""
        return torch.cat([tower(x_bd) for tower in self.towers], dim=1)
