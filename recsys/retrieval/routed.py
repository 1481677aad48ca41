# SPDX-License-Identifier: Apache-2.0
"""Informed Routing inside a retriever: which tokens a block's feed-forward network computes for."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.data.world import pooled, shared_count
from recsys.efficiency.routing.dispatch import BudgetLoss, TokenRouter, dispatch
from recsys.efficiency.routing.informed import EXECUTE, Forecaster
from recsys.retrieval.efficiency import RoutingConfig


class RoutedNetworks(nn.Module):
    """A router and a forecaster beside the feed-forward network of each block (`recsys.efficiency.routing.informed`).

    All train together with the model, where the paper adds them to one that is trained: a forecaster is fitted to its network's update as
    it stands, a router gets the model's own gradient through a straight-through choice, and the shares of all blocks are held to a budget.
    Without noise in that choice, training and evaluation route alike, so that the budget holds in both.

    Args:
        config: see `RoutingConfig`.
        blocks: how many networks.
        dim: d.
    """

    def __init__(self, config: RoutingConfig, blocks: int, dim: int) -> None:
        super().__init__()
        self.config = config
        self.forecasters = nn.ModuleList(Forecaster(dim, config.rank, config.activation) for _ in range(blocks))
        self.routers = nn.ModuleList(TokenRouter(dim, 2, config.hidden, noise=False) for _ in range(blocks))
        self._budget = BudgetLoss(BudgetLoss.Config(budget=config.budget, weight=config.weight))
        self._shares: list[Tensor] = []
        self._errors: list[Tensor] = []
        self._tokens = 0

    def forward(self, number: int, network: Callable[[Tensor], Tensor], normed: Tensor) -> Tensor:
        """``[S, d]``: the update of each of S tokens by block ``number``'s network or its forecast."""
        if number == 0:
            self._shares, self._errors, self._tokens = [], [], len(normed)
        forecaster, route = self.forecasters[number], self.routers[number](normed)
        if self.training:
            executed = network(normed)
            self._shares.append(route.shares()[EXECUTE])
            self._errors.append(F.smooth_l1_loss(forecaster(normed.detach()), executed.detach()))
            return dispatch(route, [lambda index: executed[index], lambda index: forecaster(normed[index])])
        return dispatch(route, [lambda index: network(normed[index]), lambda index: forecaster(normed[index])])

    def penalty(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What the last pass through all blocks adds to the loss, and parts to report: ``executed`` and ``forecast_error``.

        Where several processes train, shares and errors are means over the tokens of all of them; a row that a process repeats so that all
        have as many (`recsys.data.windows.SequenceLoader`) counts among them.
        """
        own = self._tokens / shared_count(self._tokens, self._shares[0])
        shares, errors = pooled(torch.stack(self._shares) * own), torch.stack(self._errors) * own
        added: Tensor = self._budget(shares) + self.config.forecast_weight * errors.sum()
        return added, {"executed": shares.mean().detach(), "forecast_error": errors.mean().detach()}
