# SPDX-License-Identifier: Apache-2.0
import math
from functools import partial

import pytest
import torch

from benchmarks.frame import Check, Ratio
from benchmarks.token_efficiency import routing_cascade, routing_decoding, routing_experts, routing_growth
from benchmarks.token_efficiency.pruning_needles import seeded
from benchmarks.token_efficiency.routing_sessions import ITEMS, TOKENS, Chain, Decoder, TreeNodes
from benchmarks.token_efficiency.rows import Row, table
from recsys.efficiency.routing.dispatch import Route

BOUNDS = {
    "informed_routing_keep60": (1.25, None),
    "duo_dispatch": (1.8, None),
    "r2r_active_parameters": (None, 0.4),
    "token_recycling_forwards": (None, 0.5),
    "tokenformer_jump": (None, 1e-10),
    "tokenformer_compute": (None, 0.5),
}


@pytest.fixture(scope="module")
def found() -> tuple[list[Row], list[Check]]:
    """Everything once, with models that were hardly trained, and no time taken."""
    seeds = range(1)
    with pytest.MonkeyPatch.context() as patch:
        for module in (routing_experts, routing_cascade, routing_decoding):
            patch.setattr(module, "beside", lambda dense, ours: Ratio(1.0, 1.0, 1.0, 5))
        for name in ("routed_network", "duo_network"):
            patch.setattr(routing_experts, name, partial(getattr(routing_experts, name), tokens=200))
        patch.setattr(routing_cascade, "USERS", 64)
        return _found(seeds)


def _found(seeds: range) -> tuple[list[Row], list[Check]]:
    pairs = [routing_experts.informed(seeds, 2), routing_experts.duo(seeds, 2), routing_cascade.r2r(seeds, 3)]
    pairs.append(routing_decoding.token_recycling(seeds, 2, 2))
    row, checks = routing_growth.tokenformer(seeds, 10)
    return [*(own for own, _ in pairs), row], [*(check for _, check in pairs), *checks]


def test_every_check_is_there_with_its_bound_and_a_value(found: tuple[list[Row], list[Check]]) -> None:
    assert {check.name: (check.at_least, check.at_most) for check in found[1]} == BOUNDS
    assert all(math.isfinite(check.value) and check.note for check in found[1])


def test_every_row_is_told(found: tuple[list[Row], list[Check]]) -> None:
    rows = [table(row) for row in found[0]]
    assert [row["module"] for row in rows] == ["informed_routing", "duo", "r2r", "token_recycling", "tokenformer"]
    assert all(row["setting"] and row["saved"] and row["paper"] and row["quality"] for row in rows)


def test_what_needs_no_training_holds(found: tuple[list[Row], list[Check]]) -> None:
    holds = {check.name: check.holds for check in found[1]}
    assert holds["informed_routing_keep60"] and holds["duo_dispatch"] and holds["tokenformer_jump"]


def test_the_routed_networks_formula_is_what_is_executed() -> None:
    unit, view = routing_experts.routed_network(dim=64, tokens=200, rank=10)
    executed = int((unit(view).route.branch == 0).sum())
    assert executed == pytest.approx(120, abs=1)
    assert routing_experts.macs(lambda: unit(view)) == routing_experts.routed_macs(executed, 200, 64, 10)
    everyone = Route.of(torch.zeros(200, dtype=torch.long), 2)
    assert routing_experts.macs(lambda: unit(view, everyone)) == 200 * 8 * 64 * 64


def test_a_third_of_the_tokens_is_big() -> None:
    network, x, route = routing_experts.duo_network(dim=32, tokens=100)
    assert route.shares().tolist() == pytest.approx([0.3, 0.7, 0.0])
    assert routing_experts.macs(lambda: network(x, route)) == 30 * 8 * 32 * 32 + 70 * 2 * 32 * 8


def test_sessions_follow_the_chain() -> None:
    chain = Chain(5)
    drawn = chain.draw(20, 9, seeded(0))
    assert drawn.shape == (20, 9) and bool((drawn[:, 0] >= ITEMS).all()) and bool((drawn[:, 1:] < ITEMS).all())
    assert bool((chain.successors[drawn[:, 1:-1]] == drawn[:, 2:, None]).any(-1).all())


@torch.no_grad()
def test_a_tree_of_prefixes_has_the_logits_of_its_sequences() -> None:
    torch.manual_seed(0)
    model = Decoder(TOKENS, 12, ITEMS).double().eval()
    context = Chain(0).draw(1, 4, seeded(0))[0]
    nodes = TreeNodes(model, context)
    first = nodes.extend(torch.zeros(3, dtype=torch.long), torch.tensor([-1, 0, 0]), torch.tensor([1, 2, 3]))
    nodes.keep(torch.tensor([0, 2]))
    second = nodes.extend(torch.zeros(1, dtype=torch.long), torch.tensor([1]), torch.tensor([4]))
    for path, logits in (((1,), first[0]), ((1, 2), first[1]), ((1, 3), first[2]), ((1, 3, 4), second[0])):
        torch.testing.assert_close(model(torch.cat((context, torch.tensor(path)))[None])[0, -1], logits, atol=1e-10, rtol=0)


def test_drafts_change_no_item_and_plain_decoding_takes_a_pass_for_each() -> None:
    torch.manual_seed(0)
    model = Decoder(TOKENS, 48, ITEMS).double().eval()
    session = Chain(0).draw(1, 8, seeded(0))[0]
    plain, counts = routing_decoding.decode(model, session, ())
    assert counts.forwards == routing_decoding.LENGTH == len(plain)
    assert routing_decoding.compared(model, session[None])[2]


def test_the_next_item_is_said_by_the_last_one_or_by_the_marker() -> None:
    world = routing_cascade.World(0)
    history, item = world.draw(400, seeded(1))
    last, marker = history[:, -1], history[history >= routing_cascade.ITEMS] - routing_cascade.ITEMS
    assert len(marker) == 400 and bool((last < routing_cascade.ITEMS).all())
    assert torch.equal(item, world.after[last, marker])
    assert len(world.codes.unique(dim=0)) == routing_cascade.ITEMS
    assert [len(own.unique()) for own in world.after] == [4] * routing_cascade.OPEN + [1] * (routing_cascade.ITEMS - routing_cascade.OPEN)


def test_growth_that_never_arrives_costs_as_much_as_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.0, 5.0, 5.0])  # from nothing, small, grown
    monkeypatch.setattr(routing_growth.Run, "loss", lambda self: next(losses))
    run = routing_growth.compared(0, 10)
    assert run.after == pytest.approx(1.0) and run.whole > 1.0 and (run.loss, run.small) == (0.0, 5.0)
