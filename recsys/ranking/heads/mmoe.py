# SPDX-License-Identifier: Apache-2.0
"""Experts shared by all tasks, and a gate per task that weighs them."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.ranking.heads.base import Head
from recsys.ranking.heads.shared_bottom import trunk
from recsys.ranking.mlp import mlp
from recsys.ranking.part import linear_flops


@register("head", "mmoe")
class MMoE(Head):
    """Multi-gate mixture of experts (Ma et al., KDD 2018).

    ``y_k = tower_k(Σ_e softmax(W_k x)_e f_e(x))``, with E experts f_e that all tasks share and a linear gate without bias for each
    task. With one expert it is the shared-bottom model; with one task besides, one MLP.

    Chosen where the paper is silent: SiLU, as in the other heads here; the gates' softmax is computed in float32 or better.
    """

    class Config(BaseConfig):
        """Sizes.

        Attributes:
            experts: E.
            expert: widths of each expert's layers, at least one.
            hidden: widths of each tower's hidden layers.
            dropout: after every hidden layer, of experts and towers.
        """

        name: Literal["mmoe"] = "mmoe"
        experts: int = Field(4, ge=1)
        expert: tuple[int, ...] = Field((64,), min_length=1)
        hidden: tuple[int, ...] = ()
        dropout: float = Field(0.0, ge=0, lt=1)

    def __init__(self, config: Config, dim: int, tasks: int) -> None:
        super().__init__(dim, tasks)
        self.width = config.expert[-1]
        self.experts = nn.ModuleList(trunk((dim, *config.expert), config.dropout) for _ in range(config.experts))
        self.gates = nn.Linear(dim, tasks * config.experts, bias=False)
        self.towers = nn.ModuleList(mlp((self.width, *config.hidden, 1), dropout=config.dropout) for _ in range(tasks))

    @property
    def flops(self) -> int:
        """Those of the linear layers, gates included, and of the weighted sums."""
        return linear_flops(self) + 2 * self.tasks * len(self.experts) * self.width

    def weights(self, x_bd: Tensor) -> Tensor:
        """How each task weighs the experts: ``[B, tasks, E]``, each row's sum is 1."""
        logits_bke = self.gates(x_bd).unflatten(1, (self.tasks, -1))
        weights_bke: Tensor = logits_bke.softmax(dim=2, dtype=torch.promote_types(logits_bke.dtype, torch.float32))
        return weights_bke.to(x_bd.dtype)

    def forward(self, x_bd: Tensor) -> Tensor:
        """Logits ``[B, tasks]``."""
        experts_bew = torch.stack([expert(x_bd) for expert in self.experts], dim=1)
        mixed_bkw = torch.bmm(self.weights(x_bd), experts_bew)
        return torch.cat([tower(mixed_bkw[:, k]) for k, tower in enumerate(self.towers)], dim=1)
