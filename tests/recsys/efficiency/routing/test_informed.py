# SPDX-License-Identifier: Apache-2.0
"""Informed Routing: execute or approximate, the same in training and out of it, and what its stages learn."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from recsys.core.errors import ConfigError
from recsys.efficiency.cost import Cost
from recsys.efficiency.routing.dispatch import BudgetLoss, Route
from recsys.efficiency.routing.informed import (
    APPROXIMATE,
    EXECUTE,
    AttentionUnit,
    Forecaster,
    PerTokenUnit,
    Routed,
    RoutedFFN,
    RoutedUnit,
    annealed,
    calibrate,
    dense_updates,
    forecast_errors,
    forecast_loss,
    recoverable,
    router_start_loss,
    routing_loss,
    train_only,
)
from recsys.efficiency.view import TokenView, offsets_of
from recsys.retrieval.transformer import Block, TransformerConfig

DIM = 8
LENGTHS = (4, 0, 1, 6)
EXACT = {"rtol": 0.0, "atol": 1e-10}


def drawn(count: int, seed: int = 0, dim: int = DIM) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(lengths=LENGTHS, seed=0) -> TokenView:
    return TokenView.of(drawn(sum(lengths), seed), offsets_of(torch.tensor(lengths, dtype=torch.long)))


def unit(kind="ffn", seed=0, **config) -> RoutedUnit:
    torch.manual_seed(seed)
    if kind == "ffn":
        inner = PerTokenUnit(nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)))
    else:
        inner = AttentionUnit.of(DIM, 2, causal=kind == "causal")
    return RoutedUnit(nn.LayerNorm(DIM), inner, DIM, RoutedUnit.Config(**config)).double()


KINDS = ("ffn", "causal", "bidirectional")


def by_loop(unit: RoutedUnit, kind: str, x: Tensor, offsets: Tensor) -> Tensor:
    """The base sub-layer, row by row."""
    out = x.clone()
    for start, end in pairwise(offsets):
        normed = F.layer_norm(x[start:end], (DIM,), unit.norm.weight, unit.norm.bias)
        if kind == "ffn":
            out[start:end] += unit.unit.network(normed)
        elif end > start:
            query, (key, value) = unit.unit.query(normed), unit.unit.key_value(normed).chunk(2, -1)
            heads = [slice(0, DIM // 2), slice(DIM // 2, DIM)]
            scores = [query[:, own] @ key[:, own].T / (DIM // 2) ** 0.5 for own in heads]
            later = (
                torch.ones_like(scores[0], dtype=torch.bool).triu(1) if kind == "causal" else torch.zeros_like(scores[0], dtype=torch.bool)
            )
            joined = [s.masked_fill(later, -torch.inf).softmax(-1) @ value[:, own] for s, own in zip(scores, heads, strict=True)]
            out[start:end] += unit.unit.out(torch.cat(joined, 1))
    return out


def constant(branch: int, count: int) -> Route:
    return Route.of(torch.full((count,), branch), 2)


def alternating(count: int, seed: int = 3) -> Route:
    return Route.of(torch.randint(2, (count,), generator=torch.Generator().manual_seed(seed)), 2)


def gated(route: Route) -> Route:
    gate = F.one_hot(route.branch, 2).double().requires_grad_()
    return Route(route.branch, route.probability.double(), gate)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_executing_everyone_is_the_base_unit_and_approximating_everyone_the_forecaster(kind):
    found, view = unit(kind), rows()
    executed = found(view, constant(EXECUTE, 11)).values
    torch.testing.assert_close(executed, by_loop(found, kind, view.values, view.offsets), **EXACT)
    approximated = found(view, constant(APPROXIMATE, 11)).values
    expected = view.values + found.forecaster(F.layer_norm(view.values, (DIM,), found.norm.weight, found.norm.bias))
    torch.testing.assert_close(approximated, expected, **EXACT)
    mixed = alternating(11)
    torch.testing.assert_close(found(view, mixed).values, torch.where((mixed.branch == EXECUTE)[:, None], executed, approximated), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_give_the_same(kind):
    found, view = unit(kind), rows()
    for seed in range(4):
        route = alternating(11, seed)
        torch.testing.assert_close(found(view, gated(route)).values, found(view, route).values, **EXACT)
    drawn_route = found.train()(view)
    assert drawn_route.route.gate is not None and 0 < int(drawn_route.route.branch.sum()) < 11
    found.eval()
    torch.testing.assert_close(found(view, Route.of(drawn_route.route.branch, 2)).values, drawn_route.values, **EXACT)


@torch.no_grad()
def test_evaluation_takes_the_likelier_branch_without_noise():
    found, view = unit().eval(), rows()
    first, second = found(view), found(view)
    assert torch.equal(first.values, second.values) and first.route.gate is None
    normed = F.layer_norm(view.values, (DIM,), found.norm.weight, found.norm.bias)
    assert torch.equal(first.route.branch, found.router.logits(normed).argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_row_depends_on_nothing_else(kind):
    found, view = unit(kind).eval(), rows()
    whole = found(view).values
    for b, length in enumerate(LENGTHS):
        start = int(view.offsets[b])
        alone = TokenView.of(view.values[start : start + length], torch.tensor([0, length]))
        torch.testing.assert_close(found(alone).values, whole[start : start + length], **EXACT)
    empty = TokenView.of(drawn(0), torch.tensor([0, 0, 0]))
    assert found(empty).values.shape == (0, DIM) == found.train()(empty).values.shape
    assert found(TokenView.of(drawn(0), torch.tensor([0]))).values.shape == (0, DIM)


@torch.no_grad()
def test_no_token_sees_a_later_one():
    found, view = unit("causal").eval(), rows((6,))
    before = found(view)
    assert 0 < int(before.route.branch.sum()) < 6
    for place in range(6):
        changed = view.values.clone()
        changed[place] = 5.0 * drawn(1, seed=9)[0]
        after = found(view.with_values(changed))
        torch.testing.assert_close(after.values[:place], before.values[:place], **EXACT)
        assert torch.equal(after.route.branch[:place], before.route.branch[:place])


@torch.no_grad()
def test_approximated_tokens_stay_visible_as_keys():
    found, view = unit("causal"), rows((5,))
    route = Route.of(torch.tensor([1, 1, 1, 1, 0]), 2)
    changed = view.values.clone()
    changed[1] = drawn(1, seed=9)[0]
    moved = found(view.with_values(changed), route).values - found(view, route).values
    assert float(moved[4].abs().max()) > 1e-4 and float(moved[2:4].abs().max()) == 0.0


def test_gradients_reach_the_router_and_not_the_frozen_base():
    base = nn.ModuleList([unit("causal", 0), unit("ffn", 1)])
    left = train_only(base, "router")
    assert {id(p) for p in left} == {id(p) for u in base for p in u.router.parameters()}
    view = rows()
    first = base[0](view)
    second = base[1](view.with_values(first.values))
    second.values.square().sum().backward()  # no budget: the task alone, also through the second unit
    for one in base:
        assert all(float(p.grad.abs().max()) > 0.0 for p in one.router.parameters())
        others = [p for name, p in one.named_parameters() if not name.startswith("router")]
        assert all(p.grad is None and not p.requires_grad for p in others)


def test_gradcheck_of_the_mixture():
    found, view = unit("causal"), rows((3, 2))
    gate = torch.rand(5, 2, dtype=torch.float64).requires_grad_()

    def result(values: Tensor, gate: Tensor) -> Tensor:
        return found(view.with_values(values), Route(gate.argmax(-1), gate, gate)).values

    assert torch.autograd.gradcheck(result, (view.values.clone().requires_grad_(), gate))


def test_gradients_flow_in_evaluation_and_are_finite_with_empty_rows():
    for kind in KINDS:
        found, view = unit(kind).eval(), rows()
        values = view.values.clone().requires_grad_()
        found(view.with_values(values), alternating(11)).values.square().sum().backward()
        assert bool(values.grad.isfinite().all()) and all(p.grad is None or bool(p.grad.isfinite().all()) for p in found.parameters())


# --- forecaster and configuration


def test_the_forecaster():
    assert [Forecaster(dim).rank for dim in (8, 320, 4096)] == [8, 8, 102] and Forecaster(64, 5).rank == 5
    x = drawn(4)
    silu, linear = Forecaster(DIM).double(), Forecaster(DIM, activation="none").double()
    linear.load_state_dict(silu.state_dict())
    inner = silu.down(x)
    torch.testing.assert_close(silu(x), silu.up(inner * inner.sigmoid()), **EXACT)
    torch.testing.assert_close(linear(x), silu.up(inner), **EXACT)
    torch.testing.assert_close(linear(x[:1] + x[1:2]) + linear(0 * x[:1]), linear(x[:1]) + linear(x[1:2]), **EXACT)


def test_the_router_has_a_width_that_exists():
    assert unit().router.logits[0].out_features == 16
    assert isinstance(unit(hidden=0).router.logits, nn.Linear) and unit(hidden=5).router.logits[0].out_features == 5
    assert unit(temperature=2.0).router.temperature == 2.0


def test_annealing():
    assert [annealed(step) for step in (0, 500, 2000, 9000)] == [5.0, 4.0, 1.0, 1.0]


def test_bad_values_are_errors():
    with pytest.raises(ConfigError, match=r"share: .* got 1.5"):
        recoverable(torch.rand(3), 1.5)
    with pytest.raises(ConfigError, match="heads: expected a divisor of dim=8, got 3"):
        AttentionUnit.of(8, 3)
    with pytest.raises(ConfigError, match="distortion_weight"):
        routing_loss([unit().eval()(rows())], BudgetLoss(BudgetLoss.Config(budget=0.5)), 0.1)


# --- padded tensors and blocks


@torch.no_grad()
def test_a_block_of_the_retriever_can_be_routed():
    torch.manual_seed(0)
    block = Block(TransformerConfig(dim=DIM, heads=2, ffn_multiplier=4)).double().eval()
    x = drawn(10).view(2, 5, DIM)
    ffn = RoutedFFN(block.ffn_norm, block.ffn, DIM, RoutedUnit.Config()).double().eval()
    torch.testing.assert_close(ffn(x, route=constant(EXECUTE, 10)).values, x + block.ffn(block.ffn_norm(x)), **EXACT)
    attention = AttentionUnit(block.query, block.key_value, block.out, block.heads)
    routed = RoutedUnit(block.attention_norm, attention, DIM, RoutedUnit.Config()).double()
    view = TokenView.padded(x, torch.tensor([5, 5]))
    attended = F.scaled_dot_product_attention(*block.project(x), is_causal=True)
    expected = x + block.out(attended.transpose(1, 2).flatten(2))
    torch.testing.assert_close(routed(view, constant(EXECUTE, 10)).values.view_as(x), expected, **EXACT)


def test_padding_is_left_alone_and_counts_nowhere():
    found = RoutedFFN(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), DIM, RoutedUnit.Config()).double().train()
    x, valid = drawn(12).view(3, 4, DIM), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    out = found(x, valid)
    assert torch.equal(out.values[~valid], x[~valid]) and out.route.branch.shape == (6,)
    route = gated(Route.of(torch.tensor([0, 1, 0, 0, 1, 0]), 2))
    loss = routing_loss([found(x, valid, route)], BudgetLoss(BudgetLoss.Config(budget=0.5)))
    assert float(loss.detach()) == pytest.approx(8.0 * (4 / 6 - 0.5))
    loss.backward()
    torch.testing.assert_close(route.gate.grad, torch.tensor([[8.0 / 6, 0.0]], dtype=torch.float64).expand(6, 2))
    dense = found.eval()(x[valid])
    torch.testing.assert_close(found(x, valid).values[valid], dense.values, **EXACT)


def test_the_distortion_is_added():
    found, view = unit(), rows()
    route = gated(alternating(11))
    out, base = found(view, route), found(view, constant(EXECUTE, 11)).values
    turned = 1.0 - F.cosine_similarity(view.values, base, dim=1)
    budget = BudgetLoss(BudgetLoss.Config(budget=0.6))
    extra = routing_loss([out], budget, 0.1) - routing_loss([out], budget)
    assert float(extra.detach()) == pytest.approx(0.1 * float((turned * (route.branch == APPROXIMATE)).mean().detach()), abs=1e-9)


@pytest.mark.parametrize("hidden", [None, 0])
@torch.no_grad()
def test_multiply_adds_at_six_tenths(hidden):
    dim, tokens = 256, 100
    ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
    found = RoutedUnit(nn.LayerNorm(dim), PerTokenUnit(ffn), dim, RoutedUnit.Config(hidden=hidden)).eval()
    view = TokenView.of(torch.randn(tokens, dim), torch.tensor([0, tokens]))
    with Cost() as routing:
        found.router(view.values)
    with Cost() as cost:
        found(view, Route.of((torch.arange(tokens) >= 60).long(), 2))
    dense = tokens * 8 * dim * dim
    assert cost.macs == 60 * 8 * dim * dim + 40 * 2 * found.forecaster.rank * dim
    assert (cost.macs + routing.macs) / dense <= 0.64


@torch.no_grad()
def test_attention_saves_queries_and_keeps_keys():
    found, view = unit("causal"), rows((40,))
    with Cost() as some:
        found.unit(view, torch.arange(10))
    with Cost() as all_:
        found.unit(view, torch.arange(40))
    keys_and_values, per_query = 40 * 2 * DIM * DIM, 2 * DIM * DIM
    assert all_.macs - some.macs == 30 * (per_query + 2 * 40 * DIM) and some.macs == keys_and_values + 10 * (per_query + 2 * 40 * DIM)


# --- the stages


def test_labels_are_the_smallest_errors():
    errors = torch.tensor([3.0, 1.0, 2.0, 1.0, 0.5, 9.0, 8.0, 1.0])
    assert recoverable(errors).nonzero()[:, 0].tolist() == [1, 4]
    assert int(recoverable(errors, 0.0).sum()) == 0 and bool(recoverable(errors, 1.0).all()) and len(recoverable(errors[:0])) == 0


def test_stage_1_loss_is_smooth_l1_on_dense_activations():
    base, view = nn.ModuleList([unit("causal", 0), unit("ffn", 1)]), rows()
    x, expected = view.values, torch.zeros(())
    for one, kind in zip(base, ("causal", "ffn"), strict=True):
        y = by_loop(one, kind, x, view.offsets)
        expected = expected + F.smooth_l1_loss(one.forecaster(one.norm(x)), y - x)
        x = y
    loss = forecast_loss(base, view)
    torch.testing.assert_close(loss, expected, **EXACT)
    loss.backward()  # though nothing was frozen
    trained = {name for name, p in base.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in base.named_parameters() if "forecaster" in name}
    assert float(forecast_loss(base, TokenView.of(drawn(0), torch.tensor([0, 0]))).detach()) == 0.0


def test_stage_1b_loss_is_cross_entropy_with_the_easiest_tokens():
    base, view = nn.ModuleList([unit("causal", 0), unit("ffn", 1)]), rows()
    expected = torch.zeros((), dtype=torch.float64)
    for one, seen in zip(base, dense_updates(base, view), strict=True):
        errors = [float(F.smooth_l1_loss(one.forecaster(n), u).detach()) for n, u in zip(seen.normed, seen.update, strict=True)]
        easiest = sorted(range(11), key=lambda t: errors[t])[:3]
        label = torch.tensor([int(t in easiest) for t in range(11)])
        expected = expected + F.cross_entropy(one.router.logits(seen.normed), label) / 2
    loss = router_start_loss(base, view)
    torch.testing.assert_close(loss, expected, **EXACT)
    loss.backward()
    assert {name.split(".")[1] for name, p in base.named_parameters() if p.grad is not None} == {"router"}


def toy() -> nn.ModuleList:
    """Attention and a feed-forward network whose update is nearly linear for half of the tokens and not for the others."""

    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.inner, self.outer = nn.Linear(DIM, DIM), nn.Linear(DIM, 32), nn.Linear(32, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(x) + (x[:, :1] > 0) * 3.0 * self.outer(torch.sin(6.0 * self.inner(x)))

    torch.manual_seed(0)
    units = [AttentionUnit.of(DIM, 2), PerTokenUnit(Bent())]
    return nn.ModuleList(RoutedUnit(nn.LayerNorm(DIM), one, DIM, RoutedUnit.Config(rank=6)) for one in units)


def toy_rows(seed: int) -> TokenView:
    return TokenView.of(drawn(128, seed).float(), torch.arange(0, 129, 8))


@pytest.fixture(scope="module")
def fitted() -> nn.ModuleList:
    units = toy()
    base = copy.deepcopy(units.state_dict())
    optimizer = torch.optim.Adam(train_only(units, "forecaster"), lr=0.01)
    for step in range(200):
        optimizer.zero_grad()
        forecast_loss(units, toy_rows(step)).backward()
        optimizer.step()
    after = units.state_dict()
    assert all(torch.equal(base[name], after[name]) for name in base if "forecaster" not in name)
    return units


def test_stage_1_forecasts_better_than_skipping(fitted):
    view = toy_rows(9999)
    for one, seen in zip(fitted, dense_updates(fitted, view), strict=True):
        skipped = F.smooth_l1_loss(torch.zeros_like(seen.update), seen.update)
        assert float(forecast_errors(one, seen).mean()) < 0.9 * float(skipped)


def test_stage_1b_finds_the_recoverable_tokens(fitted):
    units = copy.deepcopy(fitted)
    optimizer = torch.optim.Adam(train_only(units, "router"), lr=0.01)
    for step in range(120):
        optimizer.zero_grad()
        router_start_loss(units, toy_rows(step)).backward()
        optimizer.step()
    held_out = TokenView.of(drawn(4096, 9999).float(), torch.arange(0, 4097, 8))
    for one, seen, least in zip(units, dense_updates(units, held_out), (0.53, 0.7), strict=True):
        probability = one.router.logits(seen.normed).softmax(-1)[:, APPROXIMATE].detach()
        assert roc_auc_score(recoverable(forecast_errors(one, seen).detach()), probability) > least
    assert roc_auc_score(seen.normed[:, 0] <= 0, probability) > 0.8  # the tokens whose update is nearly linear


def run(units: nn.ModuleList, view: TokenView) -> tuple[Tensor, list[Routed]]:
    found = []
    for one in units:
        found.append(one(view))
        view = view.with_values(found[-1].values)
    return view.values, found


@torch.no_grad()
def executed_share(units: nn.ModuleList) -> float:
    """Of held-out tokens, over all units."""
    routed = [one for seed in range(5000, 5020) for one in run(units, toy_rows(seed))[1]]
    return sum(float(one.route.shares()[EXECUTE]) for one in routed) / len(routed)


def test_stage_2_ends_at_the_wanted_sparsity(fitted):
    units, steps = copy.deepcopy(fitted).train(), 150
    optimizer = torch.optim.Adam(train_only(units, "router"), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    budget = BudgetLoss(BudgetLoss.Config(budget=0.6))
    for step in range(steps):
        for one in units:
            one.router.temperature = annealed(step, steps=steps)
        optimizer.zero_grad()
        view = toy_rows(step)
        dense = view.values + sum(seen.update for seen in dense_updates(units, view))
        values, routed = run(units, view)
        (F.mse_loss(values, dense) + routing_loss(routed, budget)).backward()
        optimizer.step()
        schedule.step()
    assert executed_share(units) == pytest.approx(0.6, abs=0.02)  # of draws, as the release evaluates
    units.eval()
    calibrate(units, lambda: run(units, toy_rows(77))[1] + run(units, toy_rows(78))[1] + run(units, toy_rows(79))[1], 0.6)
    assert executed_share(units) == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("hidden", [None, 0])
def test_calibration_is_exact_on_its_own_data_and_keeps_the_order_of_tokens(hidden):
    units = nn.ModuleList([unit("causal", 0, hidden=hidden), unit("ffn", 1, hidden=hidden)]).eval()
    view = rows((50, 30, 20))
    before = [one.route.probability[:, EXECUTE] for one in run(units, view)[1]]
    for share in (0.3, 0.75):
        calibrate(units, lambda: run(units, view)[1], share, rounds=10)
        after = [one.route for one in run(units, view)[1]]
        assert sum(int((one.branch == EXECUTE).sum()) for one in after) == pytest.approx(200 * share, abs=2)
        assert torch.equal(after[0].probability[:, EXECUTE].argsort(), before[0].argsort())
    with pytest.raises(ConfigError, match=r"share: expected between 0 and 1, got 1\.0"):
        calibrate(units, lambda: run(units, view)[1], 1.0)
    with pytest.raises(ConfigError, match="tokens, got none"):
        calibrate(units, lambda: run(units, rows((0,)))[1], 0.5)
