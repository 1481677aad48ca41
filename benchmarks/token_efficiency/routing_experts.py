# SPDX-License-Identifier: Apache-2.0
"""Informed Routing and Duo-LLM: what dispatch saves at the specification's size, and what it costs a small trained model."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.frame import Check
from benchmarks.token_efficiency.pruning_needles import fit, seeded
from benchmarks.token_efficiency.routing_sessions import ITEMS, TOKENS, Chain, batches, next_item_loss
from benchmarks.token_efficiency.rows import Row, beside
from recsys.efficiency.cost import Cost
from recsys.efficiency.routing.dispatch import BudgetLoss, Route
from recsys.efficiency.routing.duo import BIG, SMALL, DuoFFN, DuoRouter, DuoStack, duo_budget_loss, random_routes
from recsys.efficiency.routing.informed import (
    APPROXIMATE,
    EXECUTE,
    AttentionUnit,
    PerTokenUnit,
    Routed,
    RoutedUnit,
    annealed,
    calibrate,
    forecast_loss,
    routing_loss,
    train_only,
)
from recsys.efficiency.view import TokenView

TOKENS_T, DIM = 4096, 512  # of the specification's measurements
KEEP, BIG_SHARE = 0.6, 0.3
LENGTH, ROWS, WIDTH, LAYERS = 24, 16, 32, 3


class Embedded(nn.Module):
    """Embeddings and a head around layers over jagged tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        nn.init.normal_(self.places.weight, std=0.1)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, ITEMS)

    def view(self, sessions: Tensor) -> TokenView:
        """All tokens of sessions ``[B, T]`` but the last of each."""
        rows, length = len(sessions), sessions.shape[1] - 1
        values = self.tokens(sessions[:, :-1]) + self.places(torch.arange(length))
        return TokenView.of(values.flatten(0, 1), torch.arange(rows + 1) * length)

    def loss(self, values: Tensor, sessions: Tensor) -> Tensor:
        """Cross-entropy with the next items."""
        return next_item_loss(self.head(self.norm(values)).unflatten(0, (len(sessions), -1)), sessions)


def held_out(chain: Chain) -> Tensor:
    """Sessions to measure on."""
    return chain.draw(128, LENGTH, seeded(20_000))


def macs(call: Callable[[], object]) -> int:
    """Multiply-adds of a call."""
    with Cost() as cost, torch.no_grad():
        call()
    return cost.macs


# Informed Routing


def routed_network(dim: int = DIM, tokens: int = TOKENS_T, rank: int = 100) -> tuple[RoutedUnit, TokenView]:
    """A feed-forward network with forecaster and router, calibrated so that 0.6 of these tokens are executed; untrained."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
    unit = RoutedUnit(nn.LayerNorm(dim), PerTokenUnit(network), dim, RoutedUnit.Config(rank=rank)).eval()
    view = TokenView.of(torch.randn(tokens, dim), torch.tensor([0, tokens]))
    calibrate([unit], lambda: [unit(view)], KEEP)
    return unit, view


def routed_macs(executed: int, tokens: int, dim: int, rank: int) -> int:
    """The closed formula, with the router."""
    hidden = max(16, dim // 8)
    return executed * 8 * dim * dim + (tokens - executed) * 2 * rank * dim + tokens * (dim * hidden + 2 * hidden)


def informed(seeds: range, steps: int) -> tuple[Row, Check]:
    """A feed-forward network at 0.6 executed beside all executed; losses of small models whose every sub-layer is routed."""
    unit, view = routed_network()
    dense = Route.of(torch.full((len(view.values),), EXECUTE), 2)
    saved = macs(lambda: unit(view, dense)) / macs(lambda: unit(view))
    losses = [informed_losses(seed, steps) for seed in seeds]
    before, after, skipped = (statistics.fmean(own[i] for own in losses) for i in range(3))
    executed = float(unit(view).route.shares()[EXECUTE].detach())
    row = Row(
        "informed_routing",
        f"FFN, T={TOKENS_T}, D={DIM}, rank 100, {executed:.3f} executed; losses: {LAYERS} layers of d={WIDTH}, all sub-layers routed",
        saved,
        "MACs",
        beside(lambda: unit(view, dense), lambda: unit(view)),
        "none of time published; better than skipping at 25 to 40% approximated, Llama 3B and 8B",
        f"loss {before:.3f} dense, {after:.3f} routed, {skipped:.3f} with random tokens approximated",
    )
    note = f"Cost.macs, all executed over {executed:.3f} executed, with router and forecaster"
    return row, Check("informed_routing_keep60", round(saved, 3), at_least=1.25, note=note)


def informed_losses(seed: int, steps: int) -> tuple[float, float, float]:
    """Of new sessions: dense, routed, and with as many tokens approximated by chance; after the three stages of training."""
    torch.manual_seed(seed)
    chain, model = Chain(1000 * seed), Embedded()
    sessions = batches(chain, ROWS, LENGTH, seed)
    units = nn.ModuleList()
    for _ in range(LAYERS):
        network = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        inner = [AttentionUnit.of(WIDTH, 2), PerTokenUnit(network)]
        units.extend(RoutedUnit(nn.LayerNorm(WIDTH), one, WIDTH, RoutedUnit.Config()) for one in inner)

    def run(drawn: Tensor, branch: Callable[[int], Tensor] | None = None) -> tuple[Tensor, list[Routed]]:
        view, found = model.view(drawn), []
        for unit in units:
            found.append(unit(view, None if branch is None else Route.of(branch(len(view.values)), 2)))
            view = view.with_values(found[-1].values)
        return model.loss(view.values, drawn), found

    def everyone(count: int) -> Tensor:
        return torch.full((count,), EXECUTE)

    fit([*model.parameters(), *units.parameters()], 2 * steps, lambda: run(next(sessions), everyone)[0])
    model.requires_grad_(False)
    routed = [unit for unit in units if isinstance(unit, RoutedUnit)]
    fit(train_only(units, "forecaster"), steps, lambda: forecast_loss(routed, model.view(next(sessions))))
    budget, done = BudgetLoss(BudgetLoss.Config(budget=KEEP)), iter(range(steps))

    def routers() -> Tensor:
        step = next(done)
        for unit in routed:
            unit.router.temperature = annealed(step, steps=steps)
        loss, found = run(next(sessions))
        return loss + routing_loss(found, budget)

    fit(train_only(units, "router"), steps, routers, rate=1e-2)
    units.eval()
    calibrating, tested, draws = chain.draw(64, LENGTH, seeded(30_000)), held_out(chain), seeded(seed)
    calibrate(routed, lambda: run(calibrating)[1], KEEP)

    def by_chance(count: int) -> Tensor:
        return torch.where(torch.rand(count, generator=draws) < KEEP, EXECUTE, APPROXIMATE)

    with torch.no_grad():
        return float(run(tested, everyone)[0]), float(run(tested)[0]), float(run(tested, by_chance)[0])


# Duo-LLM


def duo_network(dim: int = DIM, tokens: int = TOKENS_T) -> tuple[DuoFFN, Tensor, Route]:
    """A big network with its small sibling, tokens, and a route of 30% of them, drawn, through the big one."""
    torch.manual_seed(0)
    branch = torch.where(torch.randperm(tokens) < round(BIG_SHARE * tokens), BIG, SMALL)
    return DuoFFN(dim, 4 * dim).eval(), torch.randn(tokens, dim), Route.of(branch, 3)


def duo(seeds: range, steps: int) -> tuple[Row, Check]:
    """Dispatch at 30% big beside all big; losses of small models whose routers were held to that budget."""
    network, x, route = duo_network()
    big = Route.of(torch.full((len(x),), BIG), 3)
    saved = macs(lambda: network(x, big)) / macs(lambda: network(x, route))
    losses = [duo_losses(seed, steps) for seed in seeds]
    all_big, routed, chance, small, share = (statistics.fmean(own[i] for own in losses) for i in range(5))
    row = Row(
        "duo",
        f"FFN, T={TOKENS_T}, D={DIM}, small a 16th, {BIG_SHARE:.0%} big; losses: {LAYERS} layers of d={WIDTH}, {share:.3f} big",
        saved,
        "MACs",
        beside(lambda: network(x, big), lambda: network(x, route)),
        "none of time published; 4 of 12 layers big near all big with the oracle, 1.4B",
        f"loss {all_big:.3f} all big, {routed:.3f} routed, {chance:.3f} by chance, {small:.3f} all small",
    )
    note = f"Cost.macs of the feed-forward network, all big over {BIG_SHARE:.0%} big and the others small"
    return row, Check("duo_dispatch", round(saved, 3), at_least=1.8, note=note)


def duo_losses(seed: int, steps: int) -> tuple[float, float, float, float, float]:
    """Of new sessions: all big, routed, by chance with as many big, all small; and the share that the routers send to the big networks."""
    torch.manual_seed(seed)
    chain, model = Chain(1000 * seed), Embedded()
    stack = DuoStack(DuoStack.Config(dim=WIDTH, layers=LAYERS, hidden=4 * WIDTH, skip=False))
    sessions, draws = batches(chain, ROWS, LENGTH, seed), seeded(seed)

    def drawn_routes(tokens: int, big: float) -> list[Route]:
        return random_routes(tokens, LAYERS, stack.branches, big=big, generator=draws)

    def first() -> Tensor:
        drawn = next(sessions)
        view = model.view(drawn)
        return model.loss(stack(view, drawn_routes(len(view.values), 0.5))[0], drawn)

    fit([*model.parameters(), *stack.parameters()], 2 * steps, first)
    model.requires_grad_(False)
    stack.requires_grad_(False)
    routers_of = [module for module in stack.modules() if isinstance(module, DuoRouter)]
    routers = [p.requires_grad_(True) for name, p in stack.named_parameters() if "router" in name]
    budget, done = BudgetLoss(BudgetLoss.Config(budget=BIG_SHARE, weight=50.0, norm="l2")), iter(range(steps))

    def third() -> Tensor:
        step, drawn = next(done), next(sessions)
        for router in routers_of:
            router.temperature = annealed(step, start=1.0, end=0.1, steps=steps)
        values, routes = stack(model.view(drawn))
        return model.loss(values, drawn) + duo_budget_loss(routes, budget)

    fit(routers, steps, third, rate=2e-2)
    stack.eval()
    tested = held_out(chain)
    view = model.view(tested)
    with torch.no_grad():
        values, routes = stack(view)
        share = statistics.fmean(float(route.shares()[BIG]) for route in routes)
        others = [float(model.loss(stack(view, drawn_routes(len(view.values), big))[0], tested)) for big in (1.0, share, 0.0)]
        return others[0], float(model.loss(values, tested)), others[1], others[2], share
