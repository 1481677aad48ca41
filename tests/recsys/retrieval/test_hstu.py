# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.core.components import get
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models import HSTU, SASRec
from tests.recsys.retrieval.coded import batch_of

N, COLD = 12, (3, 11)
HISTORIES = [[1, 2, 4], [], [5, 6, 7, 8, 9, 10], [0]]
TARGETS = [(0, 0, 1), (0, 2, 4), (0, 2, 5), (2, 5, 10), (1, 0, 6), (3, 1, 8)]


def build(cls: type = HSTU, **config: object) -> HSTU:
    torch.manual_seed(0)
    warm = torch.ones(N, dtype=torch.bool)
    warm[list(COLD)] = False
    model: HSTU = cls(cls.Config(**{"dim": 8, "max_length": 6, "dropout": 0.0, "init_std": 0.5, **config}), ItemTable(N, warm)).double()
    if isinstance(model, HSTU):
        with torch.no_grad():  # the biases of distances are zero at first
            for layer in model.layers:
                layer.distance.normal_()
    return model


def state(model: HSTU, history: list[int]) -> Tensor:
    return model.encode(batch_of([history])).flat()[0]


def pointwise(model: HSTU, history: list[int]) -> Tensor:
    """The last state by the equations, place by place, in plain loops."""
    x = torch.stack([model.start, *(model.item.weight[i] for i in history)]) + model.position.weight[: len(history) + 1]
    for layer in model.layers:
        u, v, q, k = F.silu(layer.project(layer.norm_in(x))).chunk(4, dim=1)
        pooled = torch.zeros_like(x)
        heads, width = layer.heads, x.shape[1] // layer.heads
        for i in range(len(x)):
            for h in range(heads):
                own = slice(h * width, (h + 1) * width)
                for j in range(i + 1):
                    score = q[i, own] @ k[j, own] / width**0.5 + layer.distance[i - j]
                    pooled[i, own] += F.silu(score) / 7 * v[j, own]
        x = x + layer.out(layer.norm_out(pooled) * u)
    return F.normalize(x[-1], dim=0) / model.config.tau


@pytest.mark.parametrize("heads", [1, 2])
@torch.no_grad()
def test_states_are_those_of_the_equations(heads: int) -> None:
    model = build(heads=heads)
    for history in HISTORIES:
        torch.testing.assert_close(state(model, history), pointwise(model, history))


def test_the_loss_is_the_mean_cross_entropy_of_cosines_at_a_temperature() -> None:
    model = build(tau=0.2)
    warm = model.warm.nonzero()[:, 0]
    losses = []
    for row, position, target in TARGETS:
        hidden = pointwise(model, HISTORIES[row][:position]) * 0.2
        cosines = F.cosine_similarity(hidden[None], model.item.weight[warm])
        losses.append(F.cross_entropy(cosines / 0.2, (warm == target).long().argmax()))
    loss, parts = model.loss(batch_of(HISTORIES, TARGETS))
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    loss.backward()
    assert not parts["cross_entropy"].requires_grad
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@torch.no_grad()
def test_a_state_knows_nothing_of_batch_mates_or_of_what_lies_before_the_window() -> None:
    model = build()
    together = model.encode(batch_of(HISTORIES)).flat()
    for row, history in enumerate(HISTORIES):
        torch.testing.assert_close(together[row], state(model, history))
    torch.testing.assert_close(state(model, [0, 1, *HISTORIES[2]]), state(model, HISTORIES[2]))


@pytest.mark.parametrize("cls", [HSTU, SASRec])
def test_cold_items_are_neither_trained_nor_scored(cls: type) -> None:
    model = build(cls)
    assert model.item_vectors()[list(COLD)].abs().max() == 0 and model.scorable.tolist() == [i not in COLD for i in range(N)]
    targets = [*TARGETS, (0, 3, COLD[0])]
    torch.testing.assert_close(model.loss(batch_of(HISTORIES, targets))[0], model.loss(batch_of(HISTORIES, TARGETS))[0])


@pytest.mark.parametrize(("cls", "similarity"), [(HSTU, "cosine"), (HSTU, "dot"), (SASRec, "cosine"), (SASRec, "dot")])
def test_both_learn_what_follows_what_from_a_sample_of_negatives(cls: type, similarity: str) -> None:
    model = build(cls, similarity=similarity, negatives=6, tau=0.2, dim=16)
    warm = [i for i in range(N) if i not in COLD]
    chains = [[warm[i], warm[i + 1]] for i in range(len(warm) - 2)]
    targets = [(i, 2, warm[i + 2]) for i in range(len(warm) - 2)]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(batch_of(chains, targets))[0].backward()
        optimizer.step()
    scores = model.eval().encode(batch_of(chains)).flat() @ model.item_vectors().T
    assert (scores.argmax(1) == torch.tensor([item for _, _, item in targets])).float().mean() > 0.8


def test_it_is_registered() -> None:
    assert get("retriever", "hstu") is HSTU
