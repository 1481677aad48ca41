# SPDX-License-Identifier: Apache-2.0
"""Informed Routing: each token of each sub-layer is computed in full, or approximated by a small forecaster of the sub-layer's update."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.efficiency.routing.dispatch import BudgetLoss, Route, TokenRouter, dispatch
from recsys.efficiency.view import TokenView, offsets_of, to_padded

EXECUTE, APPROXIMATE = 0, 1


class Unit(Protocol):
    """The update that a pre-norm sub-layer adds to the residual stream."""

    def __call__(self, view: TokenView, index: Tensor) -> Tensor:
        """Updates ``[n, d]`` of the tokens at ``index``, int64 ``[n]`` and ascending, given all tokens' normed values."""
        ...


class PerTokenUnit(nn.Module):
    """A network from ``[n, d]`` to ``[n, d]`` that looks at no other token, such as a feed-forward network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, view: TokenView, index: Tensor) -> Tensor:
        """See `Unit`."""
        update: Tensor = self.network(view.values[index])
        return update


class AttentionUnit(nn.Module):
    """Self-attention within each row, with keys and values of all tokens, so that approximated ones stay visible.

    Queries, scores and the output projection are computed for the asked ones only.

    Args:
        query: d to d.
        key_value: d to 2 d, keys first.
        out: d to d.
        heads: must divide d.
        causal: whether a token sees only itself and the ones before it.
    """

    def __init__(self, query: nn.Module, key_value: nn.Module, out: nn.Module, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.query, self.key_value, self.out = query, key_value, out
        self.heads, self.causal = heads, causal

    @classmethod
    def of(cls, dim: int, heads: int, causal: bool = True) -> "AttentionUnit":
        """One with new linear projections."""
        if dim % heads:
            raise ConfigError(f"heads: expected a divisor of dim={dim}, got {heads}")
        return cls(nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim), heads, causal)

    def queries(self, normed: Tensor) -> Tensor:
        """``[…, d]`` to ``[…, H, d / H]``."""
        return self._split(self.query(normed))

    def memory(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each ``[…, H, d / H]``."""
        key, value = self.key_value(normed).chunk(2, -1)
        return self._split(key), self._split(value)

    def forward(self, view: TokenView, index: Tensor) -> Tensor:
        """See `Unit`."""
        query_nhe = self.queries(view.values[index])
        if not len(index):
            return self._joined(query_nhe)
        rows = view.rows[index]
        offsets = offsets_of(torch.bincount(rows, minlength=len(view)))
        key_bhle, value_bhle = (to_padded(x, view.offsets).transpose(1, 2) for x in self.memory(view.values))
        query_bhqe = to_padded(query_nhe, offsets).transpose(1, 2)
        place = torch.arange(key_bhle.shape[2], device=index.device)
        if self.causal:  # a padded query stands at place 0, where there is a key, if only a padded one
            mask_bql = place <= to_padded(index - view.offsets[rows], offsets)[..., None]
        else:
            mask_bql = (place < view.lengths[:, None].clamp(min=1))[:, None].expand(-1, query_bhqe.shape[2], -1)
        attended = F.scaled_dot_product_attention(query_bhqe, key_bhle, value_bhle, attn_mask=mask_bql[:, None])
        asked = torch.arange(query_bhqe.shape[2], device=index.device) < (offsets[1:] - offsets[:-1])[:, None]
        return self._joined(attended.transpose(1, 2)[asked])

    def _split(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (self.heads, -1))
        return split

    def _joined(self, x_nhe: Tensor) -> Tensor:
        joined: Tensor = self.out(x_nhe.flatten(1))
        return joined


class Forecaster(nn.Module):
    """A bottleneck ``W2 act(W1 x + b1) + b2`` that is fitted to a unit's update.

    The released code has a SiLU in it, the paper is said to have none: both can be had.

    Args:
        dim: d.
        rank: r of the bottleneck; None for ``max(8, d // 40)``, which is the release's 100 at a width of 4096.
        activation: of the bottleneck.
    """

    def __init__(self, dim: int, rank: int | None = None, activation: Literal["silu", "none"] = "silu") -> None:
        super().__init__()
        self.rank = max(8, dim // 40) if rank is None else rank
        self.down, self.up = nn.Linear(dim, self.rank), nn.Linear(self.rank, dim)
        self.activation = nn.SiLU() if activation == "silu" else nn.Identity()

    def forward(self, normed: Tensor) -> Tensor:
        """``[…, d]`` to ``[…, d]``."""
        forecast: Tensor = self.up(self.activation(self.down(normed)))
        return forecast


@dataclass(frozen=True)
class Routed:
    """The result of a routed unit.

    Attributes:
        values: ``[S, d]``, the residual stream after the unit.
        route: who was executed (branch 0) and who approximated (branch 1).
        distortion: ``[S]``, ``1 - cos(x, x + F)``, how much the full update turns each token; only where the route has a gate.
    """

    values: Tensor
    route: Route
    distortion: Tensor | None = None


class RoutedUnit(nn.Module):
    """``x + F(norm(x))`` for the tokens that the router executes, ``x + G(norm(x))`` for the others (Informed Routing).

    With a gate (in training) both are computed for all tokens and the hard gate weighs them; without, F is computed for its tokens only.
    Both give the same. In evaluation the router takes the likelier branch (see `calibrate`); the release samples there too, which makes its
    results random. The router reads the normed values in every stage. The release's hidden width, ``d / 4 - 200``, is negative at the
    widths of recommenders: here it is ``max(16, d // 8)``.

    Args:
        norm: of the sub-layer.
        unit: F, see `Unit`.
        dim: d.
        config: of forecaster and router.
    """

    class Config(BaseConfig):
        """Forecaster and router.

        Attributes:
            rank: of the forecaster; None for ``max(8, d // 40)``.
            activation: of the forecaster.
            hidden: width of the router's hidden layer; 0 for a linear router, None for ``max(16, d // 8)``.
            temperature: of the router's Gumbel-softmax at the start, see `annealed`.
        """

        name: Literal["informed"] = "informed"
        rank: int | None = Field(None, ge=1)
        activation: Literal["silu", "none"] = "silu"
        hidden: int | None = Field(None, ge=0)
        temperature: float = Field(5.0, gt=0.0)

    def __init__(self, norm: nn.Module, unit: nn.Module, dim: int, config: Config) -> None:
        super().__init__()
        self.norm, self.unit = norm, unit
        self.forecaster = Forecaster(dim, config.rank, config.activation)
        self.router = TokenRouter(dim, 2, max(16, dim // 8) if config.hidden is None else config.hidden, config.temperature)

    def forward(self, view: TokenView, route: Route | None = None) -> Routed:
        """The tokens of ``view``, whose values are the residual stream, after the unit.

        Args:
            view: only tokens that exist, so that no budget counts padding.
            route: decided beforehand; None for the router's.
        """
        normed = self.normed(view)
        route = self.router(normed.values) if route is None else route
        if route.gate is None:
            update = dispatch(route, [lambda index: self.unit(normed, index), lambda index: self.forecaster(normed.values[index])])
            return Routed(view.values + update, route)
        executed = self.execute(normed)
        update = dispatch(route, [lambda index: executed[index], lambda index: self.forecaster(normed.values[index])])
        return Routed(view.values + update, route, 1.0 - F.cosine_similarity(view.values, view.values + executed, dim=-1))

    def normed(self, view: TokenView) -> TokenView:
        """The view that the unit reads."""
        return view.with_values(self.norm(view.values))

    def execute(self, normed: TokenView) -> Tensor:
        """``[S, d]``: the full update of all tokens."""
        update: Tensor = self.unit(normed, torch.arange(len(normed.values), device=normed.offsets.device))
        return update


class RoutedFFN(nn.Module):
    """`RoutedUnit` around the norm and the feed-forward network of a pre-norm block, for padded tensors.

    Args:
        norm: of the sub-layer.
        ffn: from ``[n, d]`` to ``[n, d]``.
        dim: d.
        config: see `RoutedUnit`.
    """

    def __init__(self, norm: nn.Module, ffn: nn.Module, dim: int, config: RoutedUnit.Config) -> None:
        super().__init__()
        self.routed = RoutedUnit(norm, PerTokenUnit(ffn), dim, config)

    def forward(self, x: Tensor, valid: Tensor | None = None, route: Route | None = None) -> Routed:
        """The sub-layer on the tokens that exist.

        Args:
            x: ``[…, d]``.
            valid: bool ``[…]``; what does not exist is left as it is and counts nowhere. None for all.
            route: of the S valid tokens; None for the router's.

        Returns:
            Values ``[…, d]``; route and distortion of the S valid tokens.
        """
        valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if valid is None else valid
        values = x[valid]
        found = self.routed(TokenView.of(values, torch.tensor([0, len(values)], device=x.device)), route)
        return Routed(x.masked_scatter(valid[..., None].expand_as(x), found.values), found.route, found.distortion)


@dataclass(frozen=True)
class DenseUpdate:
    """What a unit did to all tokens: its normed input and its update, ``[S, d]`` each, without gradient."""

    normed: Tensor
    update: Tensor


@torch.no_grad()
def dense_updates(units: Iterable[RoutedUnit], view: TokenView) -> list[DenseUpdate]:
    """What each of the units does when all tokens are executed in all of them, one unit after another."""
    found = []
    for unit in units:
        normed = unit.normed(view)
        update = unit.execute(normed)
        found.append(DenseUpdate(normed.values, update))
        view = view.with_values(view.values + update)
    return found


def forecast_errors(unit: RoutedUnit, seen: DenseUpdate) -> Tensor:
    """``[S]``: SmoothL1 between forecast and update, the mean over the d coordinates."""
    return F.smooth_l1_loss(unit.forecaster(seen.normed), seen.update, reduction="none").mean(-1)


def forecast_loss(units: Sequence[RoutedUnit], view: TokenView) -> Tensor:
    """The loss of stage 1: SmoothL1 of the forecasts on dense activations, the mean over tokens, summed over units.

    Only forecasters receive a gradient. A model that does more between its units than hand the residual stream on records the
    `DenseUpdate` of each unit itself and sums `forecast_errors`.
    """
    per_unit = [forecast_errors(unit, seen).sum() for unit, seen in zip(units, dense_updates(units, view), strict=True)]
    return torch.stack(per_unit).sum() / max(len(view.values), 1)


def recoverable(errors: Tensor, share: float = 0.25) -> Tensor:
    """bool ``[S]``: the ``share`` of the tokens with the smallest errors; the earlier one of equals.

    Raises:
        ConfigError: ``share`` is not in [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"share: expected 0 to 1, got {share!r}")
    chosen = errors.argsort(stable=True)[: round(share * len(errors))]
    return torch.zeros_like(errors, dtype=torch.bool).index_fill(0, chosen, True)


def router_start_loss(units: Sequence[RoutedUnit], view: TokenView, share: float = 0.25) -> Tensor:
    """The loss of stage 1b: cross-entropy of each router with the label "approximate" for its unit's `recoverable` tokens.

    Each unit labels by its own forecaster's error, since each has a router of its own. Only routers receive a gradient.
    """
    total = view.values.new_zeros(())
    for unit, seen in zip(units, dense_updates(units, view), strict=True):
        label = recoverable(forecast_errors(unit, seen).detach(), share).long()
        total = total + F.cross_entropy(unit.router.logits(seen.normed), label, reduction="sum")
    return total / max(len(view.values) * len(units), 1)


def routing_loss(routed: Sequence[Routed], budget: BudgetLoss, distortion_weight: float = 0.0) -> Tensor:
    """What stage 2 adds to the task's loss: the budget's penalty, and one on approximating tokens that the full update turns far.

    Args:
        routed: of all units, on the same tokens.
        budget: on the share of executed tokens, which is 1 minus the wanted sparsity.
        distortion_weight: 0.1 in the release, where it is optional.

    Raises:
        ConfigError: ``distortion_weight`` is given, but a route has no gate.
    """
    loss: Tensor = budget(torch.stack([one.route.shares()[EXECUTE] for one in routed]))
    if not distortion_weight:
        return loss
    turned = loss.new_zeros(())
    for one in routed:
        if one.distortion is None or one.route.gate is None:
            raise ConfigError("distortion_weight: expected routes with a gate, as in training, got one without")
        turned = turned + (one.distortion * one.route.gate[:, APPROXIMATE]).sum() / max(len(one.distortion), 1)
    return loss + distortion_weight * turned / len(routed)


@torch.no_grad()
def calibrate(units: Sequence[RoutedUnit], run: Callable[[], Sequence[Routed]], share: float, rounds: int = 4) -> None:
    """Shift all routers' logits alike, so that ``share`` of the tokens is executed in evaluation, over all units together.

    The budget holds for draws of the Gumbel-softmax, with which the release also evaluates. The likelier branch may be the same for all:
    where every token is executed with probability 0.75, everyone is in evaluation. The paper has no such step. Do it after stage 2.

    Args:
        units: in evaluation; their routers' last biases are changed.
        run: the model on data that stands for what is to come, from which it returns each unit's result.
        share: of executed tokens.
        rounds: of shifting, since the routes of one unit change what the next one reads.

    Raises:
        ConfigError: ``share`` is not in (0, 1), or there are no tokens.
    """
    if not 0.0 < share < 1.0:
        raise ConfigError(f"share: expected between 0 and 1, got {share!r}")
    for _ in range(rounds):
        log_p = torch.cat([one.route.probability for one in run()]).double().clamp(min=1e-30).log()
        if not len(log_p):
            raise ConfigError("calibrate: expected tokens, got none")
        shift = (log_p[:, EXECUTE] - log_p[:, APPROXIMATE]).quantile(1.0 - share)
        for unit in units:
            last = [module for module in unit.router.logits.modules() if isinstance(module, nn.Linear)][-1]
            last.bias[EXECUTE] -= shift


def train_only(model: nn.Module, part: Literal["forecaster", "router"]) -> list[nn.Parameter]:
    """Freeze the model except for the forecasters (stage 1) or the routers (stage 2) of its routed units, and return what is left."""
    model.requires_grad_(False)
    left = []
    for unit in model.modules():
        if isinstance(unit, RoutedUnit):
            trained = unit.forecaster if part == "forecaster" else unit.router
            left += list(trained.requires_grad_(True).parameters())
    return left


def annealed(step: int, start: float = 5.0, end: float = 1.0, steps: int = 2000) -> float:
    """The temperature of the routers at a step of stage 2: linear from ``start`` to ``end``, then constant."""
    return start + (end - start) * min(max(step, 0) / steps, 1.0)
