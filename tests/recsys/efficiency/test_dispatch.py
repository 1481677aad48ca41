# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from torch import Tensor, nn

from recsys.core.errors import ConfigError
from recsys.efficiency.routing.dispatch import BudgetLoss, Route, TokenRouter, dispatch, oracle, threshold_for_recall


def tokens(count: int = 12, dim: int = 4) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def branches(x: Tensor) -> list:
    torch.manual_seed(1)
    dense = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).double()
    cheap = nn.Linear(4, 4).double()
    return [lambda i: dense(x[i]), lambda i: cheap(x[i]), lambda i: x[i]]


def router(noise: bool = False, hidden: int = 0, temperature: float = 1.0) -> TokenRouter:
    torch.manual_seed(2)
    return TokenRouter(4, 3, hidden, temperature, noise).double()


@pytest.mark.parametrize("hidden", [0, 5])
def test_training_and_inference_give_the_same(hidden: int):
    x, made = tokens(), router(hidden=hidden)
    trained, inferred = made.train()(x), made.eval()(x)
    assert torch.equal(trained.branch, inferred.branch) and len(set(inferred.branch.tolist())) > 1
    assert inferred.gate is None and trained.gate is not None
    torch.testing.assert_close(trained.probability, inferred.probability)
    torch.testing.assert_close(dispatch(trained, branches(x)), dispatch(inferred, branches(x)), atol=1e-12, rtol=0)


def test_a_drawn_route_dispatches_as_drawn():
    x, made = tokens(), router(noise=True).train()
    torch.manual_seed(3)
    drawn = made(x)
    torch.testing.assert_close(dispatch(drawn, branches(x)), dispatch(Route.of(drawn.branch, 3), branches(x)), atol=1e-12, rtol=0)
    assert not torch.equal(drawn.branch, made(x).branch)


def test_dispatch_against_a_loop():
    x = tokens()
    branch = torch.tensor([0, 2, 1, 1, 0, 2, 2, 1, 0, 0, 1, 2])
    run = branches(x)
    wanted = torch.stack([run[int(branch[s])](torch.tensor([s]))[0] for s in range(12)])
    torch.testing.assert_close(dispatch(Route.of(branch, 3), run), wanted)


@pytest.mark.parametrize("branch", [[0] * 12, [2] * 12, [1, 2] * 6])
def test_a_branch_computes_for_its_own_tokens_only(branch: list[int]):
    x, seen = tokens(), [[], [], []]

    def watched(number: int, call):
        def run(index: Tensor) -> Tensor:
            seen[number] += index.tolist()
            return call(index)

        return run

    dispatch(Route.of(torch.tensor(branch), 3), [watched(n, call) for n, call in enumerate(branches(x))])
    for number in range(3):
        assert seen[number] == [s for s, b in enumerate(branch) if b == number]


def test_no_token():
    x, made = tokens(0), router()
    for route in (made.eval()(x), made.train()(x)):
        assert dispatch(route, branches(x)).shape == (0, 4)
        assert route.shares().tolist() == [0.0, 0.0, 0.0]


def test_gradient_reaches_the_router():
    for noise in (False, True):
        x, made = tokens(), router(noise).train()
        dispatch(made(x), branches(x)).square().sum().backward()
        assert made.logits.weight.grad is not None and float(made.logits.weight.grad.abs().sum()) > 0
        made.zero_grad()
        made(x).shares()[0].backward()
        assert float(made.logits.weight.grad.abs().sum()) > 0


def test_the_gate_is_one_hot_with_the_gradient_of_the_probabilities():
    x, made = tokens(), router(temperature=0.7).train()
    route = made(x)
    torch.testing.assert_close(route.gate, torch.nn.functional.one_hot(route.branch, 3).double(), atol=1e-12, rtol=0)
    weights = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (straight,) = torch.autograd.grad((route.gate * weights).sum(), made.logits.weight)
    (soft,) = torch.autograd.grad(((made.logits(x) / 0.7).softmax(-1) * weights).sum(), made.logits.weight)
    torch.testing.assert_close(straight, soft)


def test_every_branch_has_its_gradient():
    x = tokens()
    dense, cheap = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    dispatch(Route.of(torch.tensor([0, 1] * 6), 2), [lambda i: dense(x[i]), lambda i: cheap(x[i])]).sum().backward()
    assert dense.weight.grad is not None and cheap.weight.grad is not None
    torch.testing.assert_close(dense.weight.grad, x[::2].sum(0).expand(4, 4))


def test_shares_sum_to_one():
    x, made = tokens(), router()
    counts = torch.bincount(made.eval()(x).branch, minlength=3).double() / 12
    torch.testing.assert_close(made.eval()(x).shares(), counts)
    torch.testing.assert_close(made.train()(x).shares(), counts)


def test_another_number_of_branches_is_named():
    with pytest.raises(ConfigError, match="3 branches, but 2"):
        dispatch(Route.of(torch.zeros(4, dtype=torch.long), 3), branches(tokens())[:2])


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_budget_loss_is_zero_exactly_where_the_budget_is_met(norm: str):
    whole = BudgetLoss(BudgetLoss.Config(budget=0.5, norm=norm, weight=3.0))
    each = BudgetLoss(BudgetLoss.Config(budget=0.5, norm=norm, weight=3.0, scope="per_layer"))
    met = torch.full((4,), 0.5, dtype=torch.float64)
    mixed = torch.tensor([0.25, 0.75, 1.0, 0.0], dtype=torch.float64)
    assert float(whole(met)) == float(each(met)) == float(whole(mixed)) == 0.0
    power = 1 if norm == "l1" else 2
    assert float(each(mixed)) == pytest.approx(3.0 * sum(abs(c - 0.5) ** power for c in mixed.tolist()) / 4)
    for off in (met + 0.01, met - 0.01):
        assert float(whole(off)) == pytest.approx(3.0 * 0.01**power) and float(each(off)) == pytest.approx(3.0 * 0.01**power)


@pytest.mark.parametrize("bad", [{"budget": 0.0}, {"budget": 1.2}, {"budget": 0.5, "weight": -1.0}, {"budget": 0.5, "norm": "l3"}])
def test_a_bad_budget_is_refused(bad: dict):
    with pytest.raises(ValueError, match=next(key for key in reversed(bad))):
        BudgetLoss.Config(**bad)


def losses(routes: Tensor) -> Tensor:
    """[R, S]: an interaction of layers, so that no greedy choice finds the best."""
    table = torch.randn(3, 3, 3, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.stack([table[tuple(r)] for r in routes.tolist()])


def test_the_oracle_against_trying_all():
    found = oracle(losses, 3, 3)
    every = {r: losses(torch.tensor([r]))[0] for r in itertools.product(range(3), repeat=3)}
    for s in range(7):
        best = min(every, key=lambda r, s=s: float(every[r][s]))
        assert tuple(found.routes[s].tolist()) == best and float(found.losses[s]) == float(every[best][s])
        assert all(float(found.losses[s]) <= float(loss[s]) for loss in every.values())


def test_the_oracle_keeps_to_what_is_allowed():
    found = oracle(losses, 3, 3, lambda routes: (routes == 0).sum(1) <= 1)
    assert bool(((found.routes == 0).sum(1) <= 1).all())
    assert bool((found.losses >= oracle(losses, 3, 3).losses).all())
    only = oracle(losses, 3, 3, lambda routes: (routes == torch.tensor([2, 0, 1])).all(1))
    assert only.routes.tolist() == [[2, 0, 1]] * 7


def test_what_the_oracle_cannot_do_is_named():
    with pytest.raises(ConfigError, match="no route"):
        oracle(losses, 3, 3, lambda routes: torch.zeros(len(routes), dtype=torch.bool))
    with pytest.raises(ConfigError, match="2097152 routes"):
        oracle(losses, 21, 2)


@pytest.mark.parametrize("recall", [0.1, 0.5, 0.7, 0.9, 1.0])
def test_threshold_against_trying_all(recall: float):
    generator = torch.Generator().manual_seed(0)
    probability, label = torch.rand(200, generator=generator), torch.rand(200, generator=generator) < 0.3
    found = threshold_for_recall(probability, label, recall)
    tried = torch.linspace(0.01, 0.99, 100, dtype=torch.float64).tolist()
    reach = [t for t in tried if float((probability[label].double() >= t).double().mean()) >= recall]
    assert found == max(reach, default=0.01)


def test_threshold_where_no_threshold_reaches_it():
    assert threshold_for_recall(torch.tensor([0.0, 0.9]), torch.tensor([True, True]), 1.0) == 0.01
    assert threshold_for_recall(torch.tensor([0.5]), torch.tensor([False]), 0.5) == 0.99
    for recall in (0.0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="recall"):
            threshold_for_recall(torch.tensor([0.5]), torch.tensor([True]), recall)


def test_a_branch_that_overflows_for_the_tokens_of_others_does_no_harm():
    """Inference never computes it for these; in training zero times infinity would be a NaN, in the result and in the gradient."""
    x, made = tokens().requires_grad_(), router()
    branch = made.eval()(x).branch
    run = [lambda i: torch.where((branch[i] == 0)[:, None], x[i], torch.inf), lambda i: x[i] * 2, lambda i: x[i]]
    assert bool(dispatch(made.eval()(x), run).isfinite().all())
    trained = dispatch(made.train()(x), run)
    torch.testing.assert_close(trained, dispatch(made.eval()(x), run))
