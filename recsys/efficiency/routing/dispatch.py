# SPDX-License-Identifier: Apache-2.0
"""Routing tokens to branches: the router, the dispatch, the budget that it is held to, and the exhaustive oracle."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError

Branch: TypeAlias = Callable[[Tensor], Tensor]
"""From int64 ``[n]``, the places of tokens, to their results ``[n, d]``. It may read the other tokens, but computes only for these."""


@dataclass(frozen=True)
class Route:
    """Where each of S tokens goes.

    Attributes:
        branch: int64 ``[S]``.
        probability: float ``[S, M]`` of each branch.
        gate: float ``[S, M]``, what each branch's result is weighed by: one-hot with the gradient of the probabilities, or soft, while
            training; None where no gradient is wanted.
    """

    branch: Tensor
    probability: Tensor
    gate: Tensor | None = None

    @classmethod
    def of(cls, branch: Tensor, branches: int) -> "Route":
        """A route that was decided beforehand."""
        return cls(branch, F.one_hot(branch, branches).float())

    def shares(self) -> Tensor:
        """float ``[M]``: the share of the tokens that each branch gets, with gradient where there is a gate; zeros without tokens."""
        gate = self.gate if self.gate is not None else F.one_hot(self.branch, self.probability.shape[1]).to(self.probability)
        return gate.sum(0) / max(len(self.branch), 1)


class TokenRouter(nn.Module):
    """Logits of M branches for each token; the likeliest in evaluation, a straight-through Gumbel-softmax draw in training.

    Args:
        dim: d of the tokens.
        branches: M.
        hidden: width of a hidden ReLU layer; 0 for a linear router.
        temperature: of the Gumbel-softmax; may be set between steps.
        noise: whether Gumbel noise is added in training.
    """

    def __init__(self, dim: int, branches: int, hidden: int = 0, temperature: float = 1.0, noise: bool = True) -> None:
        super().__init__()
        self.logits = (
            nn.Linear(dim, branches) if not hidden else nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, branches))
        )
        self.temperature, self.noise = temperature, noise

    def forward(self, x: Tensor) -> Route:
        """``[S, d]`` to the routes."""
        logits: Tensor = self.logits(x)
        if not self.training:
            return Route(logits.argmax(-1), logits.softmax(-1))
        if self.noise:
            gate = F.gumbel_softmax(logits, self.temperature, hard=True)
        else:
            soft = (logits / self.temperature).softmax(-1)
            gate = F.one_hot(soft.argmax(-1), soft.shape[1]).to(soft) - soft.detach() + soft
        return Route(gate.argmax(-1), logits.softmax(-1), gate)


def dispatch(route: Route, branches: Sequence[Branch]) -> Tensor:
    """``[S, d]``: each token's result from its branch.

    Without a gate every branch computes for its own tokens only (gather, compute, scatter). With one, all compute for all tokens and
    the gate weighs them: the same result, and a gradient to the router.

    Raises:
        ConfigError: the route was made for another number of branches.
    """
    if route.probability.shape[1] != len(branches):
        raise ConfigError(f"dispatch: the route has {route.probability.shape[1]} branches, but {len(branches)} were given")
    if route.gate is not None:
        everyone = torch.arange(len(route.branch), device=route.branch.device)
        results = torch.stack([branch(everyone) for branch in branches], 1)
        chosen = F.one_hot(route.branch, len(branches)).bool().view(*results.shape[:2], *[1] * (results.dim() - 2))
        # What overflows in a branch that a token does not take must reach neither the result nor the router.
        finite = torch.where(chosen | results.isfinite(), results, 0.0)
        return (finite * route.gate.view(chosen.shape)).sum(1)
    result: Tensor | None = None
    for number, branch in enumerate(branches):
        index = (route.branch == number).nonzero()[:, 0]
        if result is not None and not len(index):
            continue
        own = branch(index)
        result = own.new_zeros(len(route.branch), *own.shape[1:]) if result is None else result
        result = result.index_copy(0, index, own)
    assert result is not None
    return result


class BudgetLoss(nn.Module):
    """A penalty on how far the mean cost of the routes is from a budget.

    Informed Routing takes ``8 |budget - mean|``, Duo-LLM ``alpha (mean - budget)²`` over all layers together, Adaptive Sparse ViT
    ``2 |mean - budget|`` of the whole model's multiply-adds.
    """

    class Config(BaseConfig):
        """The penalty.

        Attributes:
            budget: the wanted mean cost, as a share of the dearest branch's.
            weight: of the penalty.
            norm: absolute or squared difference.
            scope: of the mean over all layers, or of each layer's with their mean penalty.
        """

        budget: float = Field(gt=0.0, le=1.0)
        weight: float = Field(8.0, ge=0.0)
        norm: Literal["l1", "l2"] = "l1"
        scope: Literal["global", "per_layer"] = "global"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, costs_l: Tensor) -> Tensor:
        """The penalty for the mean cost of each layer, ``[L]``, as shares of the dearest branch's."""
        mean = costs_l.mean()[None] if self.config.scope == "global" else costs_l
        gap = mean - self.config.budget
        return self.config.weight * (gap.abs() if self.config.norm == "l1" else gap.square()).mean()


@dataclass(frozen=True)
class Oracle:
    """The best routes that there are, found by trying all of them: an upper bound, since it looks at the loss.

    Attributes:
        routes: int64 ``[S, L]``, the branch of each token in each layer.
        losses: float ``[S]``, with these routes.
    """

    routes: Tensor
    losses: Tensor


def oracle(loss_of: Callable[[Tensor], Tensor], layers: int, branches: int, allowed: Callable[[Tensor], Tensor] | None = None) -> Oracle:
    """The route of lowest loss for each token.

    Args:
        loss_of: from int64 ``[R, L]`` routes to float ``[R, S]``, every token's loss under each.
        layers: L.
        branches: M; M^L routes are tried.
        allowed: from routes to bool ``[R]``, such as a budget of the dear branch; None for all.

    Raises:
        ConfigError: nothing is allowed, or there are more than 2^20 routes.
    """
    if branches**layers > 1 << 20:
        raise ConfigError(f"oracle: {branches} branches in {layers} layers are {branches**layers} routes, expected at most {1 << 20}")
    routes = torch.tensor(list(itertools.product(range(branches), repeat=layers)))
    routes = routes if allowed is None else routes[allowed(routes)]
    if not len(routes):
        raise ConfigError("oracle: no route is allowed")
    losses, best = loss_of(routes).min(0)
    return Oracle(routes.to(best.device)[best], losses)


def threshold_for_recall(probability: Tensor, label: Tensor, recall: float) -> float:
    """The highest threshold t of 0.01 to 0.99 such that ``probability >= t`` finds at least ``recall`` of the positives; 0.01 if none does.

    The highest is the one with the fewest positives (R2R's choice among 100 thresholds).

    Args:
        probability: ``[S]``.
        label: bool ``[S]``.
        recall: in (0, 1].
    """
    if not 0.0 < recall <= 1.0:
        raise ConfigError(f"recall: expected above 0 and at most 1, got {recall!r}")
    thresholds = torch.linspace(0.01, 0.99, 100, dtype=torch.float64, device=probability.device)
    found = (
        (probability[label].double()[None] >= thresholds[:, None]).double().mean(1) if bool(label.any()) else torch.ones_like(thresholds)
    )
    reached = (found >= recall).nonzero()[:, 0]
    return float(thresholds[int(reached.max()) if len(reached) else 0])
