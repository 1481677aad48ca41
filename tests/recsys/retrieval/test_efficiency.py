# SPDX-License-Identifier: Apache-2.0
"""A retriever with ``efficiency: history`` reads what is left of each history, and says the same as if that were the history."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from recsys.core.config import validate
from recsys.core.errors import CannotScoreNewItems, ConfigError
from recsys.efficiency.pruning import IDPruner
from recsys.retrieval.base import Retriever
from recsys.retrieval.catalogue import BeamIndex, Catalogue
from recsys.retrieval.efficiency import RetrieverEfficiency
from tests.recsys.retrieval.coded import batch_of, table_of
from tests.recsys.retrieval.saving import LONG, MODELS, PRUNING, TOP, build, state_of


@pytest.mark.parametrize("name", sorted(MODELS))
@torch.no_grad()
def test_the_state_is_that_of_the_events_that_are_left(name: str) -> None:
    whole, saving = build(name), build(name, efficiency=PRUNING)
    left = saving.pruned(batch_of(LONG))
    assert left.lengths.tolist() == [4, 0, 4, 1]
    for row, history in enumerate(LONG):  # in their order, the last one among them
        events = left.items[left.offsets[row] : left.offsets[row + 1]].tolist()
        rest = iter(history)
        assert all(event in rest for event in events)
        assert events[-1:] == history[-1:]
    torch.testing.assert_close(state_of(saving, batch_of(LONG)), state_of(whole, left))
    assert set(whole.state_dict()) == set(saving.state_dict())


@pytest.mark.parametrize("name", sorted(MODELS))
@torch.no_grad()
def test_it_can_be_told_anew_and_taken_back(name: str) -> None:
    model = build(name)
    before = state_of(model, batch_of(LONG))
    model.take_efficiency(validate(RetrieverEfficiency, {"history": {**PRUNING["history"], "events": 2}}))
    less = state_of(model, batch_of(LONG))
    assert less.shape != before.shape or not torch.allclose(less[0], before[0])  # TIGER's memory is as long as the history
    model.take_efficiency(None)
    torch.testing.assert_close(state_of(model, batch_of(LONG)), before, atol=0, rtol=0)
    model.take_efficiency(
        validate(RetrieverEfficiency, {"history": {"share": 1.0, **{k: v for k, v in PRUNING["history"].items() if k != "events"}}})
    )
    torch.testing.assert_close(state_of(model, batch_of(LONG)), before, atol=0, rtol=0)


def test_a_model_without_vectors_of_events_says_so() -> None:
    class Plain(Retriever):
        loss = encode = None  # type: ignore[assignment]
        scorable = torch.ones(60, dtype=torch.bool)  # type: ignore[assignment]

    model = Plain()
    model.take_efficiency(validate(RetrieverEfficiency, PRUNING))
    with pytest.raises(ConfigError, match="Plain has no vectors of events"):
        model.pruned(batch_of(LONG))


CAUSAL = ("sasrec", "rpg")
KEEP_ALL = {"hisa": {"keep": 8, "block": 2, "blocks": 4}, "token_select": {"keep": 8}, "biformer": {"region_size": 4, "top_k": 4}}


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("attention", sorted(KEEP_ALL))
@torch.no_grad()
def test_another_attention_that_reads_everything_changes_nothing(name: str, attention: str) -> None:
    whole = build(name)
    saving = build(name, efficiency={"attention": {"name": attention, "min_length": 0, **KEEP_ALL[attention]}})
    torch.testing.assert_close(state_of(saving, batch_of(LONG)), state_of(whole, batch_of(LONG)))


@pytest.mark.parametrize("name", CAUSAL)
def test_another_attention_reads_less_in_training_too(name: str) -> None:
    targets = [(0, 5, 3), (2, 6, 1), (3, 1, 2)]
    short = [history[:6] for history in LONG]
    whole = build(name).train()
    few = {"name": "hisa", "min_length": 0, "keep": 1, "block": 1, "blocks": 2}
    saving = build(name, efficiency={"attention": few}).train()
    loss, _ = saving.loss(batch_of(short, targets))
    assert not torch.allclose(loss, whole.loss(batch_of(short, targets))[0])
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in saving.parameters() if p.requires_grad)


def test_what_a_model_cannot_carry_is_refused_by_name() -> None:
    attention = {"attention": {"name": "hisa"}}
    for name in ("setrec", "tiger", "hstu", "recgpt"):
        with pytest.raises(ConfigError, match=r"efficiency: attention: .* cannot carry it, it carries .*history"):
            build(name, efficiency=attention)
    with pytest.raises(ConfigError, match="efficiency: drafts: SASRec cannot carry it"):
        build("sasrec", efficiency={"drafts": {}})
    with pytest.raises(ConfigError, match="'fasa' needs rotary positions, got learned ones"):
        build("sasrec", efficiency={"attention": {"name": "fasa"}})


@torch.no_grad()
def test_drafts_by_recipe_change_no_list() -> None:
    view = Catalogue([str(i) for i in range(len(table_of()))]).snapshot()
    lists = []
    for efficiency in (None, {"drafts": {"successors": 4, "level_sizes": [4, 8, 8]}}):
        model = build("tiger", efficiency=efficiency)
        index = BeamIndex.over(BeamIndex.Config(width=5), model, view)
        lists += [index.search(model.encode(batch_of(LONG)), 5, view) for _ in range(2)]
    for rows, scores in lists[1:]:
        np.testing.assert_array_equal(rows, lists[0][0])
        np.testing.assert_allclose(scores, lists[0][1], atol=1e-5)


@torch.no_grad()
def test_a_state_does_not_depend_on_batch_mates() -> None:
    model = build("sasrec", max_length=30, efficiency={"attention": {"name": "dsa", "keep": 3, "min_length": 4}})
    together = state_of(model, batch_of([LONG[2], list(range(25))]))
    torch.testing.assert_close(together[:1], state_of(model, batch_of([LONG[2]])))


def test_what_lets_later_events_choose_is_refused() -> None:
    for config in ({"name": "token_sparse"}, {"name": "token_select", "representative": "mean"}):
        with pytest.raises(ConfigError, match="lets later events choose what earlier ones read"):
            build("sasrec", efficiency={"attention": config})


def test_parts_are_on_the_models_side_and_in_its_mode() -> None:
    model = build("sasrec").double()
    policy = {"scorer": {"name": "cacovid", "dim": 16}, "selector": {"name": "top_k"}, "events": 4}
    model.take_efficiency(validate(RetrieverEfficiency, {"history": policy}))
    assert model.pruning is not None and not model.pruning.training
    assert {p.dtype for p in model.pruning.parameters()} == {torch.float64}
    assert model.encode(batch_of(LONG)).values.dtype == torch.float64


@pytest.mark.parametrize("name", sorted(MODELS))
def test_unknown_items_are_named_before_anything_is_judged(name: str) -> None:
    with pytest.raises(CannotScoreNewItems, match="items: row 99"):
        build(name, efficiency=PRUNING).encode(batch_of([[1, 99]]))


def test_a_pruner_of_another_kind_is_not_silently_another_one() -> None:
    with pytest.raises(ConfigError, match=r"expected a HistoryPruning\.Config, got a IDPruner\.Config"):
        build("sasrec").take_efficiency(RetrieverEfficiency(history=IDPruner.Config(share=0.5)))


@pytest.mark.parametrize("name", sorted(MODELS))
@torch.no_grad()
def test_configuration_and_weights_rebuild_a_saving_model(name: str) -> None:
    """As a bundle keeps them: JSON and a state dict."""
    parts: dict[str, Any] = {**PRUNING, "schedule": {"keep": {0: 0.5}, **TOP}}
    if name in CAUSAL:
        parts |= {"attention": {"name": "dsa", "keep": 3, "min_length": 0}}
    if name == "tiger":
        parts |= {"drafts": {"successors": 4, "level_sizes": [4, 8]}}
    model = build(name, efficiency=parts)
    config = json.loads(model.config.model_dump_json())
    torch.manual_seed(5)
    again = build(name, **{key: value for key, value in config.items() if key != "name"})
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(state_of(again, batch_of(LONG)), state_of(model, batch_of(LONG)), atol=0, rtol=0)
    assert again.fingerprint() == model.fingerprint()
