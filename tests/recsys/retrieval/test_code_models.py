# SPDX-License-Identifier: Apache-2.0
"""One contract for every model whose items are codes."""

from typing import Any

import numpy as np
import pytest
import torch

from recsys.core import components
from recsys.core.errors import CannotScoreNewItems, ConfigError, DataError
from recsys.retrieval.base import CodeRetriever
from recsys.retrieval.catalogue import BeamIndex, Catalogue, CatalogueView, DenseIndex, GatherIndex, check_pair
from recsys.retrieval.items import ItemTable
from recsys.retrieval.state import SlotLogProbs
from tests.recsys.retrieval.coded import HISTORIES, SMALL, TARGETS, N, batch_of, build, items_of, table_of

NAMES = sorted(SMALL)


def index_over(model: CodeRetriever) -> tuple[Any, CatalogueView]:
    """An index whose lists are exact, and its catalogue."""
    view = Catalogue([str(i) for i in range(len(model.table))]).snapshot()
    gathers = isinstance(model.encode(batch_of([[]])), SlotLogProbs)
    index = GatherIndex.over(GatherIndex.Config(), model, view) if gathers else BeamIndex.over(BeamIndex.Config(width=N), model, view)
    check_pair(model, index)
    return index, view


def all_scores(model: CodeRetriever, histories: list[list[int]]) -> np.ndarray:
    """Of every item after each history."""
    index, _ = index_over(model)
    scores: np.ndarray = index.score(model.encode(batch_of(histories)), np.tile(np.arange(len(model.table)), (len(histories), 1)))
    return scores


def test_every_model_over_codes_is_here() -> None:
    registered = (name for name in components.names("retriever") if issubclass(components.get("retriever", name), CodeRetriever))
    assert sorted(registered) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_wants_codes(name: str) -> None:
    cls = components.get("retriever", name)
    with pytest.raises(ConfigError, match=f"{cls.__name__}: expected items with codes"):
        cls(cls.Config(), ItemTable(3, torch.ones(3, dtype=torch.bool)))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_gradient(name: str) -> None:
    model = build(name)
    loss, parts = model.loss(batch_of(HISTORIES, TARGETS))
    loss.backward()
    assert loss.isfinite() and all(not part.requires_grad for part in parts.values())
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_batch_mates_and_events_before_the_window_do_not_matter(name: str) -> None:
    model = build(name).eval()
    long = [11, 12, 13, *HISTORIES[2]]
    together, alone = all_scores(model, [long, [], HISTORIES[2]]), all_scores(model, [HISTORIES[2]])
    np.testing.assert_allclose(together[[0, 2]], np.concatenate((alone, alone)), atol=1e-5)
    assert np.isfinite(together).all() and np.abs(together[1] - together[2]).max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_new_items_need_codes_only_and_change_no_other_score(name: str) -> None:
    model = build(name).eval()
    index, _ = index_over(model)
    before = all_scores(model, HISTORIES)
    with pytest.raises(CannotScoreNewItems, match="row 61"):
        model.encode(batch_of([[61]]))
    larger = table_of(N + 10)
    model.replace_items(items_of(larger))
    catalogue = Catalogue([str(i) for i in range(N)])
    catalogue.add([str(i) for i in range(N, N + 10)])
    view = catalogue.snapshot()
    grown = index.extended(larger, view)
    state = model.encode(batch_of([*HISTORIES[:3], [61]]))
    after = grown.score(state, np.tile(np.arange(N + 10), (4, 1)))
    np.testing.assert_allclose(after[:3, :N], before[:3], atol=1e-5)
    assert np.isfinite(after).all() and set(range(N, N + 10)) <= set(grown.search(state, N + 10, view)[0][0])
    assert bool(model.scorable.all()) and len(model.scorable) == N + 10


@pytest.mark.parametrize("name", NAMES)
def test_codes_of_another_tokenizer_are_refused(name: str) -> None:
    model = build(name)
    with pytest.raises(DataError, match="codes: tokenizer: expected t as in training, got other"):
        model.replace_items(items_of(table_of(tokenizer="other")))
    with pytest.raises(DataError, match="codes: level_sizes: expected"):
        model.replace_items(items_of(table_of(sizes=(9, 9, 9))))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_weights_alone_rebuild_it(name: str) -> None:
    model, other = build(name).eval(), build(name, table_of(N + 10)).eval()
    for parameter in other.parameters():
        parameter.add_(1.0)
    other.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(all_scores(other, HISTORIES)[:, :N], all_scores(model, HISTORIES))


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_what_follows_what(name: str) -> None:
    """Item i is followed by item i + 1, through codes alone; some items share theirs. By chance one in sixty is right."""
    model = build(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        starts = torch.randint(0, N - 4, (32,), generator=generator).tolist()
        loss, _ = model.loss(batch_of([[i, i + 1, i + 2] for i in starts], [(row, 3, i + 3) for row, i in enumerate(starts)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    index, view = index_over(model)
    with torch.no_grad():
        rows, _ = index.search(model.encode(batch_of([[i, i + 1, i + 2] for i in range(N - 4)])), 1, view)
    assert (rows[:, 0] == np.arange(3, N - 1)).mean() > 0.25


@pytest.mark.parametrize("name", NAMES)
def test_an_index_of_vectors_is_refused(name: str) -> None:
    model = build(name)
    with pytest.raises(ConfigError, match=f"retriever '{name}' gives .*, but index 'dense' accepts SlotVectors"):
        check_pair(model, DenseIndex)
    view = Catalogue([str(i) for i in range(N)]).snapshot()
    with pytest.raises(ConfigError, match="index 'dense' holds item vectors"):
        DenseIndex.over(DenseIndex.Config(), model, view)


@pytest.mark.parametrize("name", NAMES)
def test_no_target_at_all_is_a_loss_of_zero(name: str) -> None:
    model, batch = build(name), batch_of(HISTORIES, TARGETS)
    nothing = (torch.empty(0, dtype=torch.int64) for _ in range(3))
    loss, _ = model.loss(type(batch)(batch.items, batch.offsets, *nothing))
    loss.backward()
    assert float(loss.detach()) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_bad_targets_are_an_error(name: str) -> None:
    model = build(name)
    with pytest.raises(DataError, match="the batch has no targets"):
        model.loss(batch_of(HISTORIES))
    with pytest.raises(DataError, match="expected at most max_length=6"):
        model.loss(batch_of([list(range(7))], [(0, 1, 2)]))
