# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from recsys.core.components import get
from recsys.core.config import parse
from recsys.core.errors import CannotScoreNewItems, ConfigError, DataError
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models import SASRec
from tests.recsys.retrieval.coded import batch_of

N, COLD = 12, (3, 11)
HISTORIES = [[1, 2, 4], [], [5, 6, 7, 8, 9, 10], [0]]
TARGETS = [(0, 0, 1), (0, 2, 4), (0, 2, 5), (2, 5, 10), (2, 5, 10), (1, 0, 6), (3, 1, 8)]


def build(seed=0, **config):
    torch.manual_seed(seed)
    warm = torch.ones(N, dtype=torch.bool)
    warm[list(COLD)] = False
    config = {"dim": 8, "max_length": 6, "dropout": 0.0, "init_std": 0.5, **config}
    return SASRec(SASRec.Config(**config), ItemTable(N, warm)).double()


def state(model, history):
    return model.encode(batch_of([history])).flat()[0]


def test_is_registered_and_configured_by_name():
    assert get("retriever", "sasrec") is SASRec
    with pytest.raises(ConfigError, match="dropout"):
        parse(SASRec.Config, {"dropout": 1.0}, source="recipe.yaml")


def test_loss_is_the_mean_cross_entropy_of_prefixes_encoded_one_at_a_time():
    model = build()
    warm = model.warm.nonzero()[:, 0]
    losses = []
    for row, position, target in TARGETS:
        logits = state(model, HISTORIES[row][:position]) @ model.item_vectors()[warm].T
        losses.append(F.cross_entropy(logits, (warm == target).long().argmax()))
    loss, parts = model.loss(batch_of(HISTORIES, TARGETS))
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    torch.testing.assert_close(parts["cross_entropy"], loss.detach())
    assert not parts["cross_entropy"].requires_grad


def test_a_row_does_not_depend_on_its_batch_mates():
    model = build()
    together = model.encode(batch_of(HISTORIES)).flat()
    torch.testing.assert_close(together, torch.stack([state(model, h) for h in HISTORIES]))


def test_nothing_at_or_after_the_target_position_reaches_the_prediction():
    model = build()
    before = model.loss(batch_of([[1, 2, 4, 5]], [(0, 2, 6)]))[0]
    torch.testing.assert_close(before, model.loss(batch_of([[1, 2, 9, 0]], [(0, 2, 6)]))[0], rtol=0, atol=0)
    assert before != model.loss(batch_of([[1, 7, 4, 5]], [(0, 2, 6)]))[0]


def test_only_the_last_events_of_a_long_history_count():
    model = build(max_length=3)
    torch.testing.assert_close(state(model, [7, 8, 1, 2, 4]), state(model, [1, 2, 4]))
    with pytest.raises(DataError, match=r"row 0 has 4 events"):
        model.loss(batch_of([[1, 2, 4, 5]], [(0, 4, 6)]))


def test_order_matters():
    model = build()
    assert not torch.allclose(state(model, [1, 2]), state(model, [2, 1]))


def test_cold_items_are_neither_scored_nor_trained():
    model = build()
    assert model.scorable.tolist() == [i not in COLD for i in range(N)]
    assert model.item_vectors()[list(COLD)].abs().max() == 0
    assert model.collaborative_vectors()[list(COLD)].abs().max() == 0
    torch.testing.assert_close(state(model, [1, 3]), state(model, [1, 11]))
    model.loss(batch_of(HISTORIES, TARGETS))[0].backward()
    touched = model.item.weight.grad.abs().sum(1) > 0
    assert touched.tolist() == [i not in COLD for i in range(N)]
    with torch.no_grad():
        model.item.weight.fill_(1.0)  # whatever a checkpoint holds
    assert model.item_vectors()[list(COLD)].abs().max() == 0


def test_a_cold_target_is_left_out_of_the_loss():
    model = build()
    torch.testing.assert_close(model.loss(batch_of(HISTORIES, [*TARGETS, (0, 1, 3)]))[0], model.loss(batch_of(HISTORIES, TARGETS))[0])
    loss, _ = model.loss(batch_of([[1]], [(0, 1, 3)]))
    assert loss == 0
    loss.backward()


def test_rows_that_the_catalogue_did_not_have_cannot_be_scored():
    model = build()
    with pytest.raises(CannotScoreNewItems, match=r"items: row 12: the model knows the catalogue rows 0 to 11 only"):
        model.encode(batch_of([[1, 12]]))
    with pytest.raises(CannotScoreNewItems, match=r"targets: row 12"):
        model.loss(batch_of([[1]], [(0, 1, 12)]))


def test_collaborative_vectors_are_the_trained_embeddings_detached():
    model = build()
    vectors = model.collaborative_vectors()
    torch.testing.assert_close(vectors[model.warm], model.item.weight[model.warm].detach())
    vectors.zero_()
    assert model.item.weight.abs().max() > 0


def test_the_state_dict_rebuilds_the_model():
    model, other = build(0), build(1)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.encode(batch_of(HISTORIES)).values, model.encode(batch_of(HISTORIES)).values)
    assert model.extra_state() == {}


def test_gradients_against_finite_differences():
    model = build(dim=4, blocks=1, ffn_multiplier=1)
    batch = batch_of([[1, 2], []], [(0, 2, 4), (0, 1, 2), (1, 0, 5)])
    names, values = zip(*((n, p.detach().requires_grad_()) for n, p in model.named_parameters()), strict=True)
    weight = names.index("item.weight")

    def loss(*parameters):
        return functional_call(_Loss(model), {f"model.{n}": p for n, p in zip(names, parameters, strict=True)}, (batch,))

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)
    assert torch.autograd.grad(loss(*values), values[weight])[0].abs().sum() > 0


class _Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)[0]


def test_learns_what_follows_what():
    model = build(dropout=0.0, dim=16, init_std=0.05).float()
    cycle = [0, 1, 2, 4, 5, 6]
    histories = [cycle[i:] + cycle[:i] for i in range(6)]
    targets = [(row, p, (h + h)[p]) for row, h in enumerate(histories) for p in range(1, 7)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss, _ = model.loss(batch_of(histories, targets))
        loss.backward()
        optimizer.step()
    scores = model.eval().encode(batch_of([[1], [5, 6], [4, 5, 6, 0]])).flat() @ model.item_vectors().T
    assert scores.argmax(1).tolist() == [2, 0, 1]


def test_dropout_acts_in_training_only():
    model = build(dropout=0.5)
    batch = batch_of(HISTORIES)
    assert not torch.equal(model.encode(batch).values, model.encode(batch).values)
    model.eval()
    assert torch.equal(model.encode(batch).values, model.encode(batch).values)
