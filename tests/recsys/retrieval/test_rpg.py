# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recsys.core.errors import ConfigError
from recsys.retrieval.catalogue import Catalogue, DenseIndex, GatherIndex
from recsys.retrieval.models import RPG
from recsys.retrieval.state import SlotVectors
from tests.recsys.retrieval.coded import HISTORIES, N, batch_of, build, table_of


def rpg(**config: object) -> RPG:
    model = build("rpg", **config)
    assert isinstance(model, RPG)
    return model


def slot_log_probs(model: RPG, history: list[int]) -> torch.Tensor:
    """``[K, V]`` after a history, slot by slot with plain cosines."""
    items = torch.stack([torch.stack([model.embedding[k, model.table.codes[i, k]] for k in range(3)]).mean(0) for i in history] or [])
    inputs = torch.cat((model.start[None], items)) if history else model.start[None]
    state = model.transformer(inputs[None], torch.tensor([len(inputs)]))[0, -1]
    rows = []
    for k in range(3):
        head = state + F.silu(state @ model.head.inner[k]) @ model.head.outer[k]
        rows.append((F.cosine_similarity(head[None], model.embedding[k], dim=-1) / model.config.tau).log_softmax(0))
    return torch.stack(rows)


@pytest.mark.parametrize("tau", [0.03, 0.5])
def test_the_loss_is_the_mean_over_targets_and_slots_of_cross_entropies(tau: float) -> None:
    model = rpg(tau=tau)
    histories = [[1, 2, 4], [3], [5, 6, 7, 8, 9, 10], [5]]
    targets = [(0, 1, 1), (0, 2, 4), (0, 2, 5), (2, 5, 10), (3, 1, 8)]
    loss, _ = model.loss(batch_of(histories, targets))
    slot, codes = torch.arange(3), model.table.codes
    likelihoods = [slot_log_probs(model, histories[row][:position])[slot, codes[item]].mean() for row, position, item in targets]
    torch.testing.assert_close(loss, -torch.stack(likelihoods).mean(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_items_score_is_the_mean_of_its_codes_log_probabilities() -> None:
    model = rpg().eval()
    view = Catalogue([str(i) for i in range(N)]).snapshot()
    index = GatherIndex.over(GatherIndex.Config(), model, view)
    rows, scores = index.search(model.encode(batch_of([[1, 2, 4]])), N, view)
    probabilities = slot_log_probs(model, [1, 2, 4])
    exact = torch.stack([probabilities[torch.arange(3), codes].mean() for codes in model.table.codes]).numpy()
    np.testing.assert_allclose(scores[0], np.sort(exact)[::-1], atol=1e-5)
    np.testing.assert_allclose(exact[rows[0]], scores[0], atol=1e-5)


@torch.no_grad()
def test_inner_products_of_concatenated_embeddings_rank_the_same() -> None:
    """Cosines less a constant of the user: an index of vectors could serve it too (papers/retrieval.md, §7.5)."""
    model = rpg().eval()
    view = Catalogue([str(i) for i in range(N)]).snapshot()
    rows, scores = GatherIndex.over(GatherIndex.Config(), model, view).search(model.encode(batch_of(HISTORIES)), N, view)
    unit = F.normalize(model.embedding, dim=-1)
    vectors = torch.cat([unit[k, model.table.codes[:, k]] for k in range(3)], 1)
    states = torch.stack(
        [model._states(torch.tensor([h], dtype=torch.int64).view(1, -1), torch.tensor([len(h)]))[0, -1] for h in HISTORIES]
    )
    queries = F.normalize(model.head(states), dim=-1).transpose(0, 1) / model.config.tau / 3
    index = DenseIndex.build(DenseIndex.Config(), vectors, view, content_hash="m")
    _, products = index.search(SlotVectors(queries), N, view)
    shift = scores - products
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1], shift.shape), atol=1e-4)
    np.testing.assert_allclose(index.score(SlotVectors(queries), rows), products, atol=1e-4)


def test_the_order_of_codes_does_not_matter() -> None:
    """Slots permuted in the codes and in all that belongs to them: the same scores."""
    model, other = rpg().eval(), rpg().eval()
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        for name in ("embedding", "head.inner", "head.outer"):
            other.get_parameter(name).copy_(model.get_parameter(name)[order])
        other.table = type(model.table)(model.table.codes[:, order], model.table.level_sizes, "t")
        other.tokens = other.tokens_of(other.table)
        ours, theirs = (m.encode(batch_of(HISTORIES)).values for m in (model, other))
    torch.testing.assert_close(ours[:, order], theirs)


def test_levels_of_different_sizes_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"RPG: expected codes of equally large levels, got \[5, 4, 6\]"):
        build("rpg", table_of(sizes=(5, 4, 6)))
