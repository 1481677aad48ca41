# SPDX-License-Identifier: Apache-2.0
"""A retriever with ``efficiency: schedule`` drops events between its layers: what is left reads as if the rest were masked from then on."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.core.config import validate
from recsys.core.errors import ConfigError
from recsys.efficiency.cost import Cost
from recsys.efficiency.schedule import PruneSchedule
from recsys.efficiency.selection import RowSelection
from recsys.retrieval.base import Retriever
from recsys.retrieval.efficiency import RetrieverEfficiency
from recsys.retrieval.item_transformers import SetTransformer, attend_seen
from tests.recsys.retrieval.coded import batch_of
from tests.recsys.retrieval.saving import LONG, MODELS, TOP, build, state_of

HALF = {"schedule": {"keep": {0: 0.5}, **TOP}}
HISTORY = [1, 2, 4, 9, 30, 31]


def size(name: str) -> dict[str, Any]:
    """Three layers, of which the first drops."""
    return {"layers" if name == "tiger" else "blocks": 3}


def scheduled(model: Retriever) -> PruneSchedule:
    part = model if hasattr(model, "schedule") else model.transformer
    schedule: PruneSchedule = part.schedule
    return schedule


def kept_of(model: Retriever, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """The state after `HISTORY`, and which of its tokens went through: bool ``[S]``."""
    schedule, seen = scheduled(model), []

    def forward(*given: Any) -> tuple[Tensor, RowSelection]:
        values, chosen = type(schedule).forward(schedule, *given)
        seen.append(chosen.mask())
        return values, chosen

    monkeypatch.setattr(schedule, "forward", forward)
    state = state_of(model, batch_of([HISTORY]))
    assert 0 < int(seen[0].sum()) < len(seen[0])
    return state, seen[0]


@pytest.mark.parametrize("name", sorted(MODELS))
@torch.no_grad()
def test_keeping_everything_changes_nothing(name: str) -> None:
    whole = build(name, **size(name))
    kept = build(name, **size(name), efficiency={"schedule": {"keep": {0: 1.0}, **TOP}})
    torch.testing.assert_close(state_of(kept, batch_of(LONG)), state_of(whole, batch_of(LONG)))
    assert set(whole.state_dict()) == set(kept.state_dict())


@pytest.mark.parametrize("name", sorted(MODELS))
@torch.no_grad()
def test_a_state_does_not_depend_on_batch_mates(name: str) -> None:
    model = build(name, **size(name), efficiency=HALF)
    together = state_of(model, batch_of(LONG))
    alone = state_of(model, batch_of([LONG[0]]))
    torch.testing.assert_close(together[:1, : alone.shape[1]], alone)
    whole = state_of(build(name, **size(name)), batch_of(LONG))
    assert whole.shape != together.shape or not torch.allclose(whole[0], together[0])


@torch.no_grad()
def test_sasrec_reads_as_if_the_rest_were_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("sasrec", blocks=3, efficiency=HALF)
    state, kept = kept_of(model, monkeypatch)
    transformer = model.transformer
    x = model._read(torch.tensor([HISTORY])) + transformer.position.weight[:7]
    causal = torch.ones(7, 7).tril().bool()
    for number, block in enumerate(transformer.blocks):
        mask = causal if number == 0 else (causal & kept) | torch.eye(7, dtype=torch.bool)
        x = block.update(x, F.scaled_dot_product_attention(*block.project(x), attn_mask=mask))
    torch.testing.assert_close(state[:, 0], transformer.norm(x)[:, -1])


@torch.no_grad()
def test_recgpt_reads_as_if_the_rest_were_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("recgpt", blocks=3, efficiency=HALF)
    state, kept = kept_of(model, monkeypatch)
    assert kept.view(7, 3).all(1).logical_or(~kept.view(7, 3).any(1)).all()  # whole items
    transformer = model.transformer
    x = (model._groups(torch.tensor([HISTORY])) + transformer.position.weight[:7, None]).flatten(1, 2)
    group = torch.arange(21) // 3
    earlier = group[None] <= group[:, None]
    for number, block in enumerate(transformer.blocks):
        mask = earlier if number == 0 else (earlier & kept) | torch.eye(21, dtype=torch.bool)
        x = block.update(x, F.scaled_dot_product_attention(*block.project(x), attn_mask=mask))
    logits = transformer.norm(x)[:, -3:] @ model.head.T / model.config.temperature
    torch.testing.assert_close(state, logits.log_softmax(-1))


@torch.no_grad()
def test_setrec_reads_as_if_the_rest_were_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("setrec", blocks=3, efficiency=HALF)
    state, kept = kept_of(model, monkeypatch)
    transformer = model.transformer
    assert isinstance(transformer, SetTransformer)
    n, rows = model.slots, torch.tensor(HISTORY)
    memory = model.tokenize(model.content[rows], model.collaborative[rows])[None] + transformer.position.weight[:6, None]
    memory, x = memory.flatten(1, 2), (model.queries + transformer.position.weight[6])[None]
    item = torch.arange(6 * n) // n
    minus = torch.tensor(-torch.inf)
    for number, block in enumerate(transformer.blocks):
        seen = torch.ones(6 * n, dtype=torch.bool) if number == 0 else kept
        asked = F.pad(torch.where(seen, 0.0, minus).expand(n, -1), (1, 0))[None, None]
        before = F.pad(torch.where((item[None] < item[:, None]) & seen, 0.0, minus), (1, 0))[None, None]
        query, key, value = block.project(memory)
        x = block.update(x, attend_seen(*block.project(x), key, value, asked))
        memory = block.update(memory, attend_seen(query, key, value, key, value, before))
    torch.testing.assert_close(state, transformer.norm(x) * model.slot_weights()[:, None])


@torch.no_grad()
def test_hstu_reads_as_if_the_rest_had_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("hstu", blocks=3, efficiency=HALF)
    for layer in model.layers:
        layer.distance.normal_()  # so that it matters how far apart two events stood
    state, kept = kept_of(model, monkeypatch)
    x = model._read(torch.tensor([HISTORY])) + model.position.weight[:7]
    for number, layer in enumerate(model.layers):
        u, v, q, k = layer.parts(layer.norm_in(x))
        v = v if number == 0 else v * kept[:, None]
        x = x + layer.added(u, v, q, k, torch.arange(7))
    torch.testing.assert_close(state[:, 0], model._compared_state(x)[:, -1])


@torch.no_grad()
def test_tiger_reads_as_if_the_rest_were_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("tiger", layers=3, efficiency=HALF)
    state, kept = kept_of(model, monkeypatch)
    assert kept[1:].view(6, 3).all(1).logical_or(~kept[1:].view(6, 3).any(1)).all()
    t5, places = model.t5, torch.arange(19)
    x = t5.embedding(F.pad(model.tokens[torch.tensor([HISTORY])].flatten(1), (1, 0)))
    for number, layer in enumerate(t5.encoder):
        bias = t5.encoder_bias(places, places)[None]
        if number:
            bias = bias.masked_fill(~(kept | torch.eye(19, dtype=torch.bool)), -torch.inf)
        x = layer(x, bias)
    torch.testing.assert_close(state, t5.encoder_norm(x)[:, kept])


@torch.no_grad()
def test_a_pruned_layer_saves_what_the_counter_counts() -> None:
    long = [list(range(50))]
    for name in sorted(MODELS):
        costs = []
        for efficiency in (None, {"schedule": {"keep": {0: 0.25}, **TOP}}):
            model = build(name, **size(name), max_length=50, efficiency=efficiency)
            with Cost() as cost:
                model.encode(batch_of(long))
            costs.append(cost.macs)
        assert costs[1] < 0.8 * costs[0], name


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"tiger"}))
def test_dropping_behind_the_last_layer_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="keep, stop_layer: expected some of the first 2 layers, counted from 0, got 2"):
        build(name, **size(name), efficiency={"schedule": {"keep": {2: 0.5}, **TOP}})


@torch.no_grad()
def test_the_decoder_reads_what_the_last_layer_of_the_encoder_leaves() -> None:
    model = build("tiger", layers=2, efficiency={"schedule": {"keep": {1: 0.5}, **TOP}})
    memory = model.encode(batch_of([HISTORY, []]))
    whole, empty = memory.valid.sum(1).tolist()
    assert whole in (10, 12) and empty == 1  # the last item and three others, or two others and the start token


def test_a_model_that_was_told_can_be_told_anew() -> None:
    model = build("recgpt", **size("recgpt"))
    before = state_of(model, batch_of(LONG))
    model.take_efficiency(validate(RetrieverEfficiency, HALF))
    assert not torch.allclose(state_of(model, batch_of(LONG))[0], before[0])
    model.take_efficiency(None)
    torch.testing.assert_close(state_of(model, batch_of(LONG)), before, atol=0, rtol=0)
