# SPDX-License-Identifier: Apache-2.0
"""Duo-LLM: big, small or neither, and the best routes that there are."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from recsys.core.errors import ConfigError
from recsys.efficiency.cost import Cost
from recsys.efficiency.routing.dispatch import BudgetLoss, Route
from recsys.efficiency.routing.duo import (
    BIG,
    SKIP,
    SMALL,
    DuoFFN,
    DuoRouter,
    DuoStack,
    difficulty,
    duo_beam_oracle,
    duo_budget_loss,
    duo_oracle,
    random_routes,
)
from recsys.efficiency.view import TokenView, offsets_of

DIM, LAYERS = 8, 4
LENGTHS = (3, 0, 5, 1)
TOKENS = sum(LENGTHS)
EXACT = {"rtol": 0.0, "atol": 1e-10}


def stack(seed=0, **config) -> DuoStack:
    torch.manual_seed(seed)
    found = DuoStack(DuoStack.Config(**{"dim": DIM, "heads": 2, "layers": LAYERS, "hidden": 32, "ratio": 8, **config})).double().eval()
    for name, parameter in found.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.5)
    return found


def rows(lengths=LENGTHS, seed=1) -> TokenView:
    values = torch.randn(sum(lengths), DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return TokenView.of(values, offsets_of(torch.tensor(lengths, dtype=torch.long)))


HEAD = torch.randn(DIM, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
TARGET = torch.randint(6, (TOKENS,), generator=torch.Generator().manual_seed(6))


def loss(outputs: Tensor) -> Tensor:
    return F.cross_entropy((outputs @ HEAD).movedim(-1, 1), TARGET.expand(len(outputs), -1), reduction="none")


def pattern(*branches: int) -> Tensor:
    return torch.tensor(branches)


DEFAULT = pattern(SMALL, BIG, SMALL, SMALL)


def constant(branch: int, count: int, branches: int = 3) -> Route:
    return Route.of(torch.full((count,), branch), branches)


def plain(stack: DuoStack, view: TokenView, branch: str) -> Tensor:
    """A transformer whose feed-forward networks are all of one kind, row by row."""
    out = view.values.clone()
    for start, end in itertools.pairwise(view.offsets):
        x = out[start:end][None]
        for layer in stack.layers if end > start else ():
            normed, attention = layer.attention_norm(x), layer.attention
            key, value = attention.key_value(normed).chunk(2, -1)
            heads = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in (attention.query(normed), key, value))
            x = x + attention.out(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
            x = x if branch == "skip" else x + getattr(layer.ffn, branch)(layer.ffn.norm(x))
        out[start:end] = x[0]
    return out


@pytest.mark.parametrize("number, branch", [(BIG, "big"), (SMALL, "small"), (SKIP, "skip")])
@torch.no_grad()
def test_one_branch_everywhere_is_the_plain_model(number, branch):
    found, view = stack(), rows()
    values, _ = found(view, [constant(number, TOKENS)] * LAYERS)
    torch.testing.assert_close(values, plain(found, view, branch), **EXACT)
    torch.testing.assert_close(found.apart(view, torch.full((1, LAYERS), number), torch.full((LAYERS,), number))[0], values, **EXACT)


@torch.no_grad()
def test_a_soft_gate_that_is_one_hot_is_the_hard_dispatch():
    found, view = stack(temperature=1e-6), rows()
    hard, routes = found(view)
    soft, gated = found.train()(view)
    assert all(torch.equal(a.branch, b.branch) and a.gate is None and b.gate is not None for a, b in zip(routes, gated, strict=True))
    assert len({int(b) for route in routes for b in route.branch}) == 3
    torch.testing.assert_close(soft, hard, **EXACT)


def test_the_router_weighs_all_branches_in_training():
    torch.manual_seed(0)
    layer, x = DuoFFN(DIM, 32, 8).double(), rows().values
    router = DuoRouter(DIM, 3, temperature=0.5).double()
    route = router(x)
    p = ((x @ router.logits.weight.T) / 0.5).softmax(-1)
    normed = layer.norm(x)
    torch.testing.assert_close(layer(x, route), x + p[:, :1] * layer.big(normed) + p[:, 1:2] * layer.small(normed), **EXACT)
    torch.testing.assert_close(layer.cost(route), (p[:, 0] + p[:, 1] / 8).mean(), **EXACT)
    router.temperature = 1e-3
    assert bool((router(x).probability.max(-1).values > 0.99).all())


@torch.no_grad()
def test_skipping_leaves_the_token_exactly():
    layer = DuoFFN(DIM, 32).to(torch.float16)
    x = 200.0 * rows().values.half()
    assert torch.equal(layer(x, constant(SKIP, TOKENS)), x)


def test_without_skip_there_are_two_branches():
    found = stack(skip=False)
    assert found.branches == 2 and found(rows())[1][0].probability.shape == (TOKENS, 2)
    with pytest.raises(ConfigError, match="3 branches, but 2"):
        found(rows(), [constant(SKIP, TOKENS)] * LAYERS)
    with pytest.raises(ConfigError, match="routes: expected branches 0 to 1 in 4 layers"):
        found.apart(rows(), torch.full((1, LAYERS), SKIP), DEFAULT)


@torch.no_grad()
def test_only_the_chosen_networks_compute():
    found, x = stack().layers[0].ffn, rows().values
    route = Route.of(torch.tensor([BIG, BIG, SMALL, SKIP, SMALL, SMALL, SKIP, BIG, SMALL]), 3)
    with Cost() as cost:
        found(x, route)
    assert cost.macs == 3 * 2 * DIM * 32 + 4 * 2 * DIM * 4
    assert float(found.cost(route)) * TOKENS * 2 * DIM * 32 == pytest.approx(cost.macs)


@torch.no_grad()
def test_rows_and_later_tokens_have_no_influence():
    found, view = stack(), rows()
    whole, _ = found(view)
    for b, length in enumerate(LENGTHS):
        start = int(view.offsets[b])
        alone, _ = found(TokenView.of(view.values[start : start + length], torch.tensor([0, length])))
        torch.testing.assert_close(alone, whole[start : start + length], **EXACT)
    changed = view.values.clone()
    changed[5:8] = 7.0  # tokens 2 to 4 of the third row
    torch.testing.assert_close(found(view.with_values(changed))[0][:5], whole[:5], **EXACT)
    assert found(TokenView.of(view.values[:0], torch.tensor([0, 0])))[0].shape == (0, DIM)


# --- stage 1


def test_random_routes():
    generator = torch.Generator().manual_seed(0)
    routes = torch.stack([route.branch for route in random_routes(20000, 3, 3, generator=generator)])
    assert (routes == BIG).double().mean(1).tolist() == pytest.approx([0.5] * 3, abs=0.02) and not bool((routes == SKIP).any())
    routes = torch.stack([route.branch for route in random_routes(20000, 3, 3, big=0.3, skip=0.2)])
    assert torch.bincount(routes.flatten()).div(60000).tolist() == pytest.approx([0.3, 0.5, 0.2], abs=0.02)
    pairs = (routes[0] == BIG) & (routes[1] == BIG)
    assert float(pairs.double().mean()) == pytest.approx(0.09, abs=0.02)  # drawn for each layer
    assert len(random_routes(0, 2, 2)) == 2
    for arguments in ({"big": -0.1}, {"big": 0.7, "skip": 0.4}, {"branches": 2, "skip": 0.1}):
        with pytest.raises(ConfigError, match="random_routes"):
            random_routes(**{"tokens": 3, "layers": 2, "branches": 3, **arguments})


def test_stage_1_trains_big_and_small_and_no_router():
    found, view = stack().train(), rows()
    found(view, random_routes(TOKENS, LAYERS, 3))[0].square().sum().backward()
    trained = {name.split(".")[2] + name.split(".")[3] for name, p in found.named_parameters() if p.grad is not None}
    assert {"ffnbig", "ffnsmall", "attentionquery"} <= trained and not any("router" in name for name in trained)


# --- stage 2


@torch.no_grad()
def alone(found: DuoStack, view: TokenView, token: int, route: Tensor, default: Tensor) -> Tensor:
    """By the definition: the whole sequence on the default, and one token on its route."""
    branch = default[:, None].repeat(1, TOKENS)
    branch[:, token] = route
    return found(view, [Route.of(one, found.branches) for one in branch])[0][token]


@torch.no_grad()
def test_every_token_is_routed_apart():
    found, view = stack(), rows()
    routes = torch.randint(3, (7, LAYERS), generator=torch.Generator().manual_seed(2))
    routes[3] = routes[0]
    outputs = found.apart(view, routes, DEFAULT)
    expected = torch.stack([torch.stack([alone(found, view, t, route, DEFAULT) for t in range(TOKENS)]) for route in routes])
    torch.testing.assert_close(outputs, expected, **EXACT)
    torch.testing.assert_close(found.apart(view, routes[:, None].expand(-1, TOKENS, -1), DEFAULT), expected, **EXACT)
    torch.testing.assert_close(found.apart(view, DEFAULT[None], DEFAULT)[0], found(view, [constant(int(b), TOKENS) for b in DEFAULT])[0])
    own = torch.randint(3, (2, TOKENS, LAYERS), generator=torch.Generator().manual_seed(3))
    expected = torch.stack([torch.stack([alone(found, view, t, route[t], DEFAULT) for t in range(TOKENS)]) for route in own])
    torch.testing.assert_close(found.apart(view, own, DEFAULT), expected, **EXACT)


@torch.no_grad()
def test_the_oracle_is_the_best_of_all_routes_tried_one_by_one():
    found, view = stack(layers=3), rows()
    default = DEFAULT[:3]
    best = duo_oracle(found, view, loss, default, chunk=5)
    for token in (0, 2, 5, 8):
        losses = {
            route: float(F.cross_entropy(alone(found, view, token, torch.tensor(route), default) @ HEAD, TARGET[token]))
            for route in itertools.product(range(3), repeat=3)
        }
        assert tuple(best.routes[token].tolist()) == min(losses, key=losses.__getitem__)
        assert float(best.losses[token]) == pytest.approx(min(losses.values()), abs=1e-10)


@torch.no_grad()
def test_the_oracle_is_not_above_any_route():
    found, view = stack(), rows()
    best = duo_oracle(found, view, loss, DEFAULT).losses
    fixed = torch.stack([torch.full((LAYERS,), b) for b in (BIG, SMALL, SKIP)] + [DEFAULT])
    drawn = torch.randint(3, (30, TOKENS, LAYERS), generator=torch.Generator().manual_seed(7))
    for losses in (loss(found.apart(view, fixed, DEFAULT)), loss(found.apart(view, drawn, DEFAULT))):
        assert bool((best <= losses + 1e-12).all()) and float(best.mean()) < float(losses.mean(1).min())


@torch.no_grad()
def test_more_routes_never_make_it_worse():
    found, view = stack(), rows()
    by_budget = torch.stack([duo_oracle(found, view, loss, DEFAULT, budget=big).losses for big in range(LAYERS + 1)])
    up_to = by_budget.cummin(0).values
    best = duo_oracle(found, view, loss, DEFAULT)
    torch.testing.assert_close(up_to[-1], best.losses, **EXACT)
    two = stack(skip=False)
    two.load_state_dict({k: v if "router" not in k else v[:2] for k, v in found.state_dict().items()})
    assert bool((best.losses <= duo_oracle(two, view, loss, DEFAULT).losses + 1e-12).all())


@torch.no_grad()
def test_a_budget_is_kept_exactly():
    found, view = stack(), rows()
    for big in range(LAYERS + 1):
        for best in (duo_oracle(found, view, loss, DEFAULT, big), duo_beam_oracle(found, view, loss, DEFAULT, 2, big)):
            assert (best.routes == BIG).sum(1).tolist() == [big] * TOKENS and bool(best.losses.isfinite().all())
    with pytest.raises(ConfigError, match="no route"):
        duo_oracle(found, view, loss, DEFAULT, LAYERS + 1)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("budget", [None, 1, 3])
@torch.no_grad()
def test_a_beam_of_full_width_is_the_oracle(skip, budget):
    found, view = stack(skip=skip, layers=6 if not skip else 4), rows()
    default = torch.full((len(found.layers),), SMALL)
    best = duo_oracle(found, view, loss, default, budget)
    beam = duo_beam_oracle(found, view, loss, default, found.branches ** len(found.layers), budget)
    torch.testing.assert_close(beam.losses, best.losses, **EXACT)
    assert torch.equal(beam.routes, best.routes)


@torch.no_grad()
def test_a_narrow_beam_lies_between_and_says_its_own_loss():
    found, view = stack(), rows()
    best = duo_oracle(found, view, loss, DEFAULT).losses
    for width in (1, 3):
        beam = duo_beam_oracle(found, view, loss, DEFAULT, width)
        assert bool((beam.losses >= best - 1e-12).all()) and bool(
            (beam.losses <= loss(found.apart(view, DEFAULT[None], DEFAULT)) + 1e-12).all()
        )
        torch.testing.assert_close(loss(found.apart(view, beam.routes[None], DEFAULT))[0], beam.losses, **EXACT)
    for arguments in ((0, None), (1, 5), (1, -1)):
        with pytest.raises(ConfigError, match="beam oracle"):
            duo_beam_oracle(found, view, loss, DEFAULT, *arguments)


@torch.no_grad()
def test_layers_are_computed_once_for_routes_that_begin_alike():
    found, view = stack(skip=False, layers=6, hidden=64), rows()
    default, routes = torch.full((6,), BIG), torch.tensor(list(itertools.product(range(2), repeat=6)))
    with Cost() as all_:
        found.apart(view, routes, default)
    with Cost() as one:
        found(view, [constant(BIG, TOKENS, 2)] * 6)
    assert all_.macs < 0.4 * len(routes) * one.macs  # 2^6 routes


@torch.no_grad()
def test_difficulty_is_what_could_be_gained():
    found, view = stack(), rows()
    best = duo_oracle(found, view, loss, DEFAULT)
    small = torch.stack([alone(found, view, t, torch.full((LAYERS,), SMALL), DEFAULT) for t in range(TOKENS)])
    gained = difficulty(found, view, loss, DEFAULT, best)
    torch.testing.assert_close(gained, loss(small[None])[0] - best.losses, **EXACT)
    assert bool((gained >= -1e-12).all()) and float(gained.max()) > 0.1


@torch.no_grad()
def test_the_oracle_of_a_token_does_not_look_at_later_ones_or_other_rows():
    found, view = stack(layers=3), rows()
    before = duo_oracle(found, view, loss, DEFAULT[:3])
    changed = view.values.clone()
    changed[[0, 1, 2, 6, 7, 8]] = 3.0
    after = duo_oracle(found, view.with_values(changed), loss, DEFAULT[:3])
    assert torch.equal(after.routes[3:6], before.routes[3:6])
    torch.testing.assert_close(after.losses[3:6], before.losses[3:6], **EXACT)


@torch.no_grad()
def test_the_oracle_of_no_tokens():
    empty = TokenView.of(torch.zeros(0, DIM, dtype=torch.float64), torch.tensor([0, 0]))
    nothing = duo_oracle(stack(), empty, lambda outputs: outputs.sum(-1), DEFAULT)
    assert nothing.routes.shape == (0, LAYERS) and nothing.losses.shape == (0,)
    assert duo_beam_oracle(stack(), empty, lambda outputs: outputs.sum(-1), DEFAULT, 2).routes.shape == (0, LAYERS)


# --- stage 3


def routes_of(shares: list[float]) -> list[Route]:
    found = []
    for share in shares:
        p = torch.tensor([[share, 1 - share]] * 4, dtype=torch.float64).requires_grad_()
        found.append(Route(p.argmax(-1), p, p))
    return found


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6), st.floats(0.05, 1.0))
def test_the_budget_is_the_mean_over_layers(shares, wanted):
    budget = BudgetLoss(BudgetLoss.Config(budget=wanted, weight=3.0, norm="l2"))
    routes = routes_of(shares)
    penalty = duo_budget_loss(routes, budget)
    mean = sum(shares) / len(shares)
    assert float(penalty.detach()) == pytest.approx(3.0 * (mean - wanted) ** 2, abs=1e-9)
    penalty.backward()
    expected = 6.0 * (mean - wanted) / len(shares) / 4
    for route in routes:  # each layer is pushed alike, whatever its own share
        torch.testing.assert_close(route.gate.grad[:, BIG], torch.full((4,), expected, dtype=torch.float64), atol=1e-9, rtol=1e-6)


def test_the_budget_loss_is_zero_exactly_at_the_budget():
    budget = BudgetLoss(BudgetLoss.Config(budget=0.5, norm="l2"))
    losses = [duo_budget_loss(routes_of(shares), budget).detach() for shares in ([0.25, 0.75], [0.25, 0.5])]
    assert float(losses[0]) == 0.0 < float(losses[1])


def test_the_routers_learn_within_the_budget():
    """Layers whose big branch helps get it: tokens of stage 3, with branches frozen."""
    found, view = stack(layers=3, skip=False).train(), rows((8,) * 8)
    found.requires_grad_(False)
    routers = [p.requires_grad_(True) for name, p in found.named_parameters() if "router" in name]
    with torch.no_grad():
        target = found(view, [constant(b, 64, 2) for b in (BIG, SMALL, SMALL)])[0]
    budget = BudgetLoss(BudgetLoss.Config(budget=1 / 3, weight=200.0, norm="l2"))
    optimizer, losses = torch.optim.Adam(routers, lr=0.05), []
    for step in range(100):
        for layer in found.layers:
            layer.router.temperature = 1.0 - 0.5 * step / 100
        optimizer.zero_grad()
        values, routes = found(view)
        losses.append(float(F.mse_loss(values, target).detach()))
        (F.mse_loss(values, target) + duo_budget_loss(routes, budget)).backward()
        optimizer.step()
    shares = [float(route.shares()[BIG].detach()) for route in routes]
    assert sum(shares) / 3 == pytest.approx(1 / 3, abs=0.05) and losses[-1] < 0.8 * losses[0]
    assert shares[0] > max(shares[1:])
