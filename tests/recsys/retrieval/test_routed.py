# SPDX-License-Identifier: Apache-2.0
"""A retriever with ``efficiency: routing`` computes its feed-forward networks for a part of the tokens."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from recsys.core.components import get
from recsys.core.config import validate
from recsys.core.errors import ConfigError
from recsys.efficiency.cost import Cost
from recsys.retrieval.base import Retriever
from recsys.retrieval.efficiency import RetrieverEfficiency
from recsys.retrieval.models import SETRec
from tests.recsys.retrieval.coded import batch_of, items_of, table_of
from tests.recsys.retrieval.saving import LONG, TOP, build, state_of

CARRIED = ("rpg", "sasrec")
ROUTING: dict[str, Any] = {"routing": {"budget": 0.5, "rank": 2, "hidden": 4}}
SHORT = [history[:6] for history in LONG]
TARGETS = [(0, 5, 3), (0, 2, 4), (2, 6, 1), (3, 1, 2), (2, 3, 7)]


def send_all(model: Retriever, branch: int) -> None:
    """Every token to one branch: 0 computes, 1 forecasts."""
    for router in model.transformer.routes.routers:
        last = router.logits[-1]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(torch.tensor([1.0, -1.0]) * (1 - 2 * branch))


def with_weights_of(whole: Retriever, name: str) -> Retriever:
    model = build(name, efficiency=ROUTING)
    missing, unexpected = model.load_state_dict(whole.state_dict(), strict=False)
    assert not unexpected
    assert all(".routes." in key for key in missing)
    return model


@pytest.mark.parametrize("name", CARRIED)
@torch.no_grad()
def test_computing_for_everyone_changes_nothing(name: str) -> None:
    whole = build(name)
    model = with_weights_of(whole, name)
    send_all(model, 0)
    torch.testing.assert_close(state_of(model, batch_of(LONG)), state_of(whole, batch_of(LONG)))


@pytest.mark.parametrize("name", CARRIED)
@torch.no_grad()
def test_forecasting_for_everyone_is_the_model_with_forecasters_for_networks(name: str) -> None:
    whole = build(name)
    model = with_weights_of(whole, name)
    send_all(model, 1)
    with Cost() as less:
        found = state_of(model, batch_of(LONG))
    with Cost() as cost:
        state_of(whole, batch_of(LONG))
    assert less.macs < cost.macs
    for block, forecaster in zip(whole.transformer.blocks, model.transformer.routes.forecasters, strict=True):
        block.ffn = nn.Sequential(forecaster)
    torch.testing.assert_close(found, state_of(whole, batch_of(LONG)))


@pytest.mark.parametrize("name", CARRIED)
@torch.no_grad()
def test_a_state_does_not_depend_on_batch_mates_or_padding(name: str) -> None:
    model = build(name, efficiency=ROUTING)
    together = state_of(model, batch_of([LONG[2], LONG[0], []]))
    torch.testing.assert_close(together[:1], state_of(model, batch_of([LONG[2]])))
    torch.testing.assert_close(together[2:], state_of(model, batch_of([[]])))


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("budget", [0.3, 0.7])
def test_training_holds_the_budget_and_evaluation_routes_as_training_does(name: str, budget: float) -> None:
    model = build(name, efficiency={"routing": {**ROUTING["routing"], "budget": budget}}).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    batch = batch_of(SHORT, TARGETS)
    told = []
    for _ in range(150):
        optimizer.zero_grad()
        loss, parts = model.loss(batch)
        loss.backward()
        optimizer.step()
        told.append(parts)
    assert abs(float(torch.stack([p["executed"] for p in told[-30:]]).mean()) - budget) < 0.12
    assert told[-1]["cross_entropy"] < 0.8 * told[0]["cross_entropy"]
    trained, _ = model.loss(batch)
    model.eval()
    torch.testing.assert_close(model.loss(batch)[1]["cross_entropy"], model.train().loss(batch)[1]["cross_entropy"], rtol=1e-3, atol=1e-5)
    assert trained.isfinite()


@pytest.mark.parametrize("name", CARRIED)
def test_routers_and_forecasters_learn_and_networks_do_not_learn_from_forecasts(name: str) -> None:
    model = build(name, efficiency=ROUTING).train()
    loss, _ = model.loss(batch_of(SHORT, TARGETS))
    loss.backward()
    routes = model.transformer.routes
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in routes.parameters())
    send_all(model, 1)
    model.zero_grad()
    loss, _ = model.loss(batch_of(SHORT, TARGETS))
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for block in model.transformer.blocks for p in block.ffn.parameters())


def test_it_can_be_switched_off_and_on_but_not_added() -> None:
    model = build("sasrec", efficiency=ROUTING)
    routed = state_of(model, batch_of(LONG))
    model.take_efficiency(None)
    assert not torch.allclose(state_of(model, batch_of(LONG)), routed)
    assert "executed" not in model.train().loss(batch_of(SHORT, TARGETS))[1]
    model.eval().take_efficiency(validate(RetrieverEfficiency, ROUTING))
    torch.testing.assert_close(state_of(model, batch_of(LONG)), routed)
    with pytest.raises(ConfigError, match="efficiency: routing: it has weights of its own; expected what the model was built with"):
        build("sasrec").take_efficiency(validate(RetrieverEfficiency, ROUTING))
    with pytest.raises(ConfigError, match="efficiency: routing: expected no schedule beside it"):
        build("sasrec", efficiency={**ROUTING, "schedule": {"keep": {0: 0.5}, **TOP}})
    with pytest.raises(ConfigError, match="efficiency: routing: HSTU cannot carry it"):
        build("hstu", efficiency=ROUTING)


@torch.no_grad()
def test_configuration_and_weights_rebuild_it() -> None:
    model = build("sasrec", efficiency=ROUTING)
    cls = get("retriever", "sasrec")
    again = cls(validate(cls.Config, json.loads(model.config.model_dump_json())), items_of(table_of()))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(state_of(again.eval(), batch_of(LONG)), state_of(model, batch_of(LONG)))


@torch.no_grad()
def test_a_set_model_begins_with_the_networks_of_a_routed_one() -> None:
    setrec = build("setrec", warm_start=True)
    assert isinstance(setrec, SETRec)
    sasrec = build("sasrec", efficiency=ROUTING)
    setrec.warm_start(sasrec)
    torch.testing.assert_close(setrec.transformer.blocks[0].ffn[0].weight, sasrec.transformer.blocks[0].ffn[0].weight)
