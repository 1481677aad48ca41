# SPDX-License-Identifier: Apache-2.0
"""Duo-LLM: each feed-forward network has a small sibling; each token takes the big one, the small one, or neither, in every layer."""

from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.efficiency.routing.dispatch import BudgetLoss, Oracle, Route, dispatch, oracle
from recsys.efficiency.routing.informed import AttentionUnit
from recsys.efficiency.view import TokenView, held, to_padded

BIG, SMALL, SKIP = 0, 1, 2

TokenLoss = Callable[[Tensor], Tensor]
"""From outputs ``[R, S, d]`` of S tokens under R routes to their losses ``[R, S]``."""


class DuoFFN(nn.Module):
    """``x + F(norm(x))`` with a big F, a small one, or none; skipping leaves the token as it is.

    Args:
        dim: d.
        hidden: width of the big network's hidden layer.
        ratio: the small one's is ``hidden // ratio``, at least 1.
        skip: whether there is the third branch.
    """

    def __init__(self, dim: int, hidden: int, ratio: int = 16, skip: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        small = max(1, hidden // ratio)
        self.big, self.small = (nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim)) for width in (hidden, small))
        self.branches, self.small_cost = 3 if skip else 2, small / hidden

    def forward(self, x: Tensor, route: Route) -> Tensor:
        """``[S, d]`` to ``[S, d]``."""
        normed = self.norm(x)
        branches = [lambda i: self.big(normed[i]), lambda i: self.small(normed[i]), lambda i: torch.zeros_like(x[i])]
        return x + dispatch(route, branches[: self.branches])

    def cost(self, route: Route) -> Tensor:
        """The mean cost of a token as a share of the big network's (its multiply-adds), with gradient where the route has a gate."""
        shares = route.shares()
        return shares[BIG] + self.small_cost * shares[SMALL]


class DuoRouter(nn.Module):
    """``softmax(W x / temperature)`` over the branches, which weighs them in training; in evaluation the likeliest is taken.

    The paper says that the temperature is increased to make choices harder, which holds for the inverse: here it is to be lowered.
    """

    def __init__(self, dim: int, branches: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.logits = nn.Linear(dim, branches, bias=False)
        self.temperature = temperature

    def forward(self, x: Tensor) -> Route:
        """``[S, d]``, the residual stream, to the routes."""
        probability = (self.logits(x) / self.temperature).softmax(-1)
        return Route(probability.argmax(-1), probability, probability if self.training else None)


class DuoLayer(nn.Module):
    """Pre-norm causal attention that all share, then a `DuoFFN` with its router."""

    def __init__(self, config: "DuoStack.Config") -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = AttentionUnit.of(config.dim, config.heads)
        self.ffn = DuoFFN(config.dim, config.hidden, config.ratio, config.skip)
        self.router = DuoRouter(config.dim, self.ffn.branches, config.temperature)

    def attend(self, view: TokenView) -> Tensor:
        """``[S, d]``: the residual stream after the attention."""
        normed = view.with_values(self.attention_norm(view.values))
        attended: Tensor = view.values + self.attention(normed, torch.arange(len(view.values), device=view.offsets.device))
        return attended

    def attend_apart(self, x_psd: Tensor, view: TokenView) -> Tensor:
        """The same for P variants ``[P, S, d]`` of each token, each of which reads itself and the tokens before it as ``view`` has them."""
        own = self.attention_norm(x_psd)
        own_key, own_value = self.attention.memory(own)
        query, own_key, own_value = (
            to_padded(x.transpose(0, 1), view.offsets).permute(0, 3, 2, 1, 4) for x in (self.attention.queries(own), own_key, own_value)
        )
        key, value = (
            to_padded(x, view.offsets).transpose(1, 2)[:, :, None] for x in self.attention.memory(self.attention_norm(view.values))
        )
        place = torch.arange(query.shape[3], device=query.device)
        scores = (query @ key.transpose(-1, -2)).masked_fill(place >= place[:, None], -torch.inf)
        scores = torch.cat((scores, (query * own_key).sum(-1, keepdim=True)), -1) * query.shape[-1] ** -0.5
        weights = scores.softmax(-1)
        attended = weights[..., :-1] @ value + weights[..., -1:] * own_value
        flat = attended.permute(0, 3, 2, 1, 4).flatten(3)[held(view.lengths, query.shape[3])]
        attended_psd: Tensor = self.attention.out(flat.transpose(0, 1))
        return x_psd + attended_psd


class DuoStack(nn.Module):
    """Duo-LLM's layers, its three stages and its oracle.

    Stage 1 trains all branches with `random_routes`, so that they can stand in for each other; stage 2 looks for the best routes
    (`duo_oracle`); stage 3 trains the routers with `duo_budget_loss`.
    """

    class Config(BaseConfig):
        """Size and routers.

        Attributes:
            dim: d.
            heads: attention heads.
            layers: L.
            hidden: width of the big network's hidden layer.
            ratio: of the big to the small one's.
            skip: whether a token may skip both.
            temperature: of the routers at the start.
        """

        name: Literal["duo"] = "duo"
        dim: int = Field(64, ge=1)
        heads: int = Field(2, ge=1)
        layers: int = Field(4, ge=1)
        hidden: int = Field(256, ge=1)
        ratio: int = Field(16, ge=1)
        skip: bool = True
        temperature: float = Field(1.0, gt=0.0)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DuoLayer(config) for _ in range(config.layers))
        self.branches = self._layers()[0].ffn.branches

    def _layers(self) -> list[DuoLayer]:
        return cast(list[DuoLayer], list(self.layers))

    def forward(self, view: TokenView, routes: Sequence[Route] | None = None) -> tuple[Tensor, list[Route]]:
        """All tokens through all layers, by the routers or by given routes.

        Args:
            view: its values are the inputs, with positions already in them.
            routes: of the S tokens in each layer; None for the routers'.

        Returns:
            ``[S, d]`` and the routes.
        """
        taken = []
        for number, layer in enumerate(self._layers()):
            x = layer.attend(view)
            taken.append(layer.router(x) if routes is None else routes[number])
            view = view.with_values(layer.ffn(x, taken[-1]))
        return view.values, taken

    def apart(self, view: TokenView, routes: Tensor, default_l: Tensor) -> Tensor:
        """``[R, S, d]``: every token under each of R routes of its own, while the tokens before it take the default.

        So no token's route changes what another one reads, and S searches run at once. Layers are computed once for routes that begin
        alike.

        Args:
            view: the inputs.
            routes: int64 ``[R, L]`` for all tokens, or ``[R, S, L]`` for each.
            default_l: int64 ``[L]``.

        Raises:
            ConfigError: the routes or the default do not fit layers and branches.
        """
        self._check(routes, default_l)
        x_psd, state = view.values[None], torch.zeros(len(routes), dtype=torch.long, device=routes.device)
        for number, layer in enumerate(self._layers()):
            x_psd = layer.attend_apart(x_psd, view)
            begun = routes[..., : number + 1]
            if routes.dim() == 2:
                begun, next_state = begun.unique(dim=0, return_inverse=True)
                x_psd = x_psd[torch.zeros(len(begun), dtype=torch.long, device=state.device).index_copy(0, next_state, state)]
                state, branch = next_state, begun[:, -1:].expand(-1, x_psd.shape[1])
            else:
                x_psd, branch = x_psd.expand(len(routes), -1, -1), begun[..., -1]
            x_psd = layer.ffn(x_psd.flatten(0, 1), Route.of(branch.flatten(), self.branches)).view_as(x_psd)
            everyone = default_l[number].expand(len(view.values))
            view = view.with_values(layer.ffn(layer.attend(view), Route.of(everyone, self.branches)))
        return x_psd[state] if routes.dim() == 2 else x_psd

    def _check(self, routes: Tensor, default_l: Tensor) -> None:
        for name, given in (("routes", routes), ("default", default_l)):
            if given.shape[-1] != len(self.layers) or bool(((given < 0) | (given >= self.branches)).any()):
                raise ConfigError(
                    f"{name}: expected branches 0 to {self.branches - 1} in {len(self.layers)} layers, got {tuple(given.shape)}"
                )


def random_routes(
    tokens: int,
    layers: int,
    branches: int,
    big: float = 0.5,
    skip: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> list[Route]:
    """The routes of stage 1, drawn for each token in each layer.

    Args:
        tokens: S.
        layers: L.
        branches: of the stack.
        big: probability of the big branch.
        skip: probability of skipping, where that is a branch. The paper is silent on it: there is nothing to train in it.
        generator: of the draws.
        device: of the routes.

    Raises:
        ConfigError: the probabilities are not any.
    """
    if big < 0.0 or skip < 0.0 or big + skip > 1.0 or (skip and branches < 3):
        raise ConfigError(f"random_routes: expected probabilities of {branches} branches, got big={big!r} and skip={skip!r}")
    draw = torch.rand(layers, tokens, generator=generator, device=device)
    branch = torch.where(draw < big, BIG, torch.where(draw < big + skip, SKIP, SMALL))
    return [Route.of(one, branches) for one in branch]


def duo_budget_loss(routes: Sequence[Route], budget: BudgetLoss) -> Tensor:
    """What stage 3 adds to the task's loss, ``alpha (mean over layers of P_big - budget)²``: layers may share the budget as they like.

    Args:
        routes: of all layers.
        budget: with ``norm="l2"`` and ``scope="global"``, the budget as a share of the layers.
    """
    loss: Tensor = budget(torch.stack([route.shares()[BIG] for route in routes]))
    return loss


def duo_oracle(stack: DuoStack, view: TokenView, loss: TokenLoss, default_l: Tensor, budget: int | None = None, chunk: int = 256) -> Oracle:
    """Every token's best route of all, found by trying all of them.

    It looks at the target: an upper bound and a source of labels, never a result.

    Args:
        stack: in evaluation.
        view: the inputs.
        loss: of outputs.
        default_l: int64 ``[L]``, the route of the tokens before.
        budget: the number of big layers; None for any.
        chunk: so many routes at once.
    """

    def loss_of(routes: Tensor) -> Tensor:
        return torch.cat([loss(stack.apart(view, some, default_l)) for some in routes.to(view.offsets.device).split(chunk)])

    with torch.no_grad():
        allowed = None if budget is None else lambda routes: (routes == BIG).sum(1) == budget
        return oracle(loss_of, len(stack.layers), stack.branches, allowed)


@torch.no_grad()
def duo_beam_oracle(stack: DuoStack, view: TokenView, loss: TokenLoss, default_l: Tensor, width: int, budget: int | None = None) -> Oracle:
    """A good route of every token, with ``width`` partial ones kept from layer to layer: the same as `duo_oracle` where none is dropped.

    A partial route is judged by its loss when the default follows. The paper has no such search.

    Args:
        stack: see `duo_oracle`.
        view: see `duo_oracle`.
        loss: see `duo_oracle`.
        default_l: see `duo_oracle`.
        width: of the beam.
        budget: see `duo_oracle`.

    Raises:
        ConfigError: ``width`` is below 1, or ``budget`` not a number of layers.
    """
    layers, tokens = len(stack.layers), len(view.values)
    if width < 1 or (budget is not None and not 0 <= budget <= layers):
        raise ConfigError(f"beam oracle: expected width from 1 and budget 0 to {layers}, got {width!r} and {budget!r}")
    beams = default_l.new_zeros(1, tokens, 0)
    losses = view.values.new_zeros(1, tokens)
    for layer in range(layers):
        branch = torch.arange(stack.branches, device=beams.device).view(-1, 1, 1, 1).expand(-1, *beams.shape[:2], 1)
        beams = torch.cat((beams.expand(stack.branches, -1, -1, -1), branch), -1).flatten(0, 1)
        rest = default_l[layer + 1 :].expand(*beams.shape[:2], -1)
        losses = loss(stack.apart(view, torch.cat((beams, rest), -1), default_l))
        if budget is not None:
            big = (beams == BIG).sum(-1)
            losses = losses.masked_fill((big > budget) | (big + layers - 1 - layer < budget), torch.inf)
        losses, kept = (x[:width] for x in losses.sort(stable=True, dim=0))
        beams = beams.gather(0, kept[..., None].expand(-1, -1, layer + 1))
    return Oracle(beams[0], losses[0])


@torch.no_grad()
def difficulty(stack: DuoStack, view: TokenView, loss: TokenLoss, default_l: Tensor, best: Oracle) -> Tensor:
    """``[S]``: a token's loss with small branches only, minus its best. A high loss alone may be one that nothing would lower."""
    small = torch.full((1, len(stack.layers)), SMALL, device=view.offsets.device)
    return loss(stack.apart(view, small, default_l))[0] - best.losses
