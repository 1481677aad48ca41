# SPDX-License-Identifier: Apache-2.0
"""A retriever with ``efficiency: history`` reads what is left of each history, and says the same as if that were the history."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from recsys.core.components import get
from recsys.core.config import validate
from recsys.core.errors import ConfigError
from recsys.data.batch import SequenceBatch
from recsys.retrieval.base import Retriever
from recsys.retrieval.efficiency import RetrieverEfficiency
from tests.recsys.retrieval.coded import SMALL, batch_of, items_of, table_of

LONG = [[1, 2, 4, 9, 9, 30, 31, 3, 8], [], [5, 6, 7, 8, 9, 10], [5]]
PLAIN = {"dim": 16, "blocks": 2, "heads": 2, "dropout": 0.0, "max_length": 6, "init_std": 0.2}
MODELS = {**SMALL, "sasrec": PLAIN, "hstu": PLAIN, "setrec": {**PLAIN, "semantic_tokens": 2, "ae_hidden": [8]}}
PRUNING = {"history": {"events": 4, "scorer": {"name": "context"}, "selector": {"name": "mmr"}}}


def build(name: str, **config: Any) -> Retriever:
    torch.manual_seed(0)
    cls = get("retriever", name)
    vectors = torch.randn(len(table_of()), 5, generator=torch.Generator().manual_seed(2))
    items = replace(items_of(table_of()), collaborative=vectors)
    model: Retriever = cls(validate(cls.Config, {"name": name, **MODELS[name], **config}), items)
    return model.eval()


def state_of(model: Retriever, batch: SequenceBatch) -> torch.Tensor:
    return model.encode(batch).values


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
        scorable = None  # type: ignore[assignment]

    model = Plain()
    model.take_efficiency(validate(RetrieverEfficiency, PRUNING))
    with pytest.raises(ConfigError, match="Plain has no vectors of events"):
        model.pruned(batch_of(LONG))
