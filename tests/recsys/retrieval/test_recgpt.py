# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from recsys.core.errors import ConfigError, DataError
from recsys.retrieval.catalogue import BeamIndex, Catalogue, GatherIndex
from recsys.retrieval.item_transformers import HybridTransformer
from recsys.retrieval.models import RecGPT
from recsys.retrieval.transformer import TransformerConfig
from tests.recsys.retrieval.coded import HISTORIES, TARGETS, N, batch_of, build, items_of, table_of

K = 3


def recgpt(**config: object) -> RecGPT:
    model = build("recgpt", **config)
    assert isinstance(model, RecGPT)
    return model


def states(model: RecGPT, history: list[int]) -> Tensor:
    """``[L + 1, K, d]``."""
    found: Tensor = model._states(torch.tensor([history], dtype=torch.int64).view(1, -1), torch.tensor([len(history)]))[0]
    return found


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_token_sees_its_own_item_and_those_before_it(bidirectional: bool) -> None:
    """By gradients: which inputs does each output depend on?"""
    torch.manual_seed(0)
    model = HybridTransformer(TransformerConfig(dim=8, blocks=2, heads=2, dropout=0.0, max_length=4, init_std=0.5)).double()
    x = torch.randn(1, 4, K, 8, dtype=torch.float64, requires_grad=True)
    for p in range(4 * K):
        (grad,) = torch.autograd.grad(model(x, torch.tensor([4]), bidirectional)[0].flatten(0, 1)[p].square().sum(), x)
        seen = grad[0].flatten(0, 1).abs().sum(1) > 0
        expected = [q // K <= p // K if bidirectional else q <= p for q in range(4 * K)]
        assert seen.tolist() == expected


def test_the_loss_is_the_mean_over_targets_and_slots_of_cross_entropies() -> None:
    model = recgpt()
    loss, _ = model.loss(batch_of(HISTORIES, TARGETS))
    expected = []
    for row, position, item in TARGETS:
        logits = states(model, HISTORIES[row][:position])[-1] @ model.head.T
        expected += [functional.cross_entropy(logits[k], model.table.codes[item, k]) for k in range(K)]
    torch.testing.assert_close(loss, torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_lists_do_not_depend_on_the_temperature_and_scores_are_log_probabilities() -> None:
    view = Catalogue([str(i) for i in range(N)]).snapshot()
    everything = []
    for temperature in (0.1, 1.0):
        model = recgpt(temperature=temperature).eval()
        state = model.encode(batch_of([[1, 2, 4]]))
        torch.testing.assert_close(state.values.exp().sum(-1), torch.ones(1, K))
        index = GatherIndex.over(GatherIndex.Config(), model, view)
        rows, scores = index.search(state, N, view)
        logits = states(model, [1, 2, 4])[-1] @ model.head.T / temperature
        exact = logits.log_softmax(1)[torch.arange(K), model.table.codes].sum(1).numpy()
        np.testing.assert_allclose(exact[rows[0]], scores[0], atol=1e-4)
        everything.append(exact * temperature)
    shift = everything[0] - everything[1]
    np.testing.assert_allclose(shift, shift[0], atol=1e-4)


@torch.no_grad()
def test_the_published_search_finds_live_items_and_never_better_ones_than_the_exact_one() -> None:
    model = recgpt().eval()
    catalogue = Catalogue([str(i) for i in range(N)])
    catalogue.set_live([str(i) for i in range(0, N, 2)], False)
    view, state = catalogue.snapshot(), model.encode(batch_of(HISTORIES))
    exact = GatherIndex.over(GatherIndex.Config(), model, view).search(state, 5, view)
    published = BeamIndex.Config(widths=(4, 6, 6), children=2)
    rows, scores = BeamIndex.over(published, model, view).search(state, 5, view)
    assert (rows % 2 == 1).all() and (scores <= exact[1] + 1e-5).all()
    wide = BeamIndex.over(BeamIndex.Config(width=N), model, view).search(state, 5, view)
    np.testing.assert_allclose(wide[1], exact[1], atol=1e-4)


@torch.no_grad()
def test_items_that_share_all_codes_are_all_returned() -> None:
    table = table_of()
    codes = table.codes.clone()
    codes[7] = codes[11] = codes[3]
    model = build("recgpt", replace(table, codes=codes)).eval()
    view = Catalogue([str(i) for i in range(N)]).snapshot()
    rows, scores = GatherIndex.over(GatherIndex.Config(), model, view).search(model.encode(batch_of([[1, 2]])), N, view)
    at = [rows[0].tolist().index(i) for i in (3, 7, 11)]
    assert at == sorted(at) and len({float(scores[0, place]) for place in at}) == 1 and len(set(rows[0])) == N


def test_without_the_auxiliary_stream_text_is_not_read() -> None:
    with torch.no_grad():
        ours, other = recgpt(auxiliary=False).eval(), recgpt().eval()
        items = items_of(table_of())
        assert items.text is not None
        before = [model.encode(batch_of(HISTORIES[:1])).values for model in (ours, other)]
        for model in (ours, other):
            model.replace_items(replace(items, text=items.text.flip(0)))
        after = [model.encode(batch_of(HISTORIES[:1])).values for model in (ours, other)]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    assert "aux.weight" not in dict(ours.named_parameters())


@torch.no_grad()
def test_a_catalogue_never_seen_needs_text_and_codes_only() -> None:
    """The scores over another catalogue are those of a model that was built for it with the same weights."""
    model, everything = recgpt().eval(), items_of(table_of(2 * N))
    assert everything.text is not None
    table = table_of(2 * N)
    codes = replace(table, codes=table.codes[N:])
    items = replace(everything, count=N, warm=torch.zeros(N, dtype=torch.bool), text=everything.text[N:], codes=codes)
    fresh = RecGPT(model.config, items).eval()
    fresh.load_state_dict(model.state_dict())
    before = model.encode(batch_of(HISTORIES)).values
    model.replace_items(items)
    after = model.encode(batch_of(HISTORIES)).values
    assert torch.equal(after, fresh.encode(batch_of(HISTORIES)).values) and not torch.equal(after, before)


def test_text_that_does_not_fit_is_an_error() -> None:
    items = items_of(table_of())
    assert items.text is not None
    for text, message in ((None, "got none"), (items.text[:, :10], "got a width of 10")):
        with pytest.raises(ConfigError, match=f"recgpt: expected text embeddings of a width that 3 slots divide, {message}"):
            RecGPT(RecGPT.Config(), replace(items, text=text))
    model = recgpt()
    with pytest.raises(DataError, match=r"items.text: expected 12 columns as in training, got 9"):
        model.replace_items(replace(items, text=items.text[:, :9]))
    with pytest.raises(ConfigError, match="RecGPT: expected codes of equally large levels"):
        build("recgpt", table_of(sizes=(5, 4, 6)))
