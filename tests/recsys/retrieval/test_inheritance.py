# SPDX-License-Identifier: Apache-2.0
"""New items inherit collaborative vectors of items of like text, and are found by them."""

import math

import pytest
import torch

from recsys.core.errors import ConfigError
from recsys.retrieval import inheritance
from recsys.retrieval.inheritance import Inheritance, inherited
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models import SETRec
from tests.recsys.retrieval.coded import batch_of, table_of

N, NEW = 40, (3, 11, 12, 39)


def features(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    warm = torch.ones(N, dtype=torch.bool)
    warm[list(NEW)] = False
    return torch.randn(N, 5, generator=random) * warm[:, None], warm, torch.randn(N, 7, generator=random)


@pytest.mark.parametrize(("neighbours", "at_once"), [(1, 1024), (4, 2), (100, 3)])
def test_equals_brute_force(neighbours: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inheritance, "_AT_ONCE", at_once)
    vectors, warm, text = features()
    found = inherited(vectors, warm, text, Inheritance(neighbours=neighbours, temperature=0.3, gain=1.5))
    for row in range(N):
        if row not in NEW:
            torch.testing.assert_close(found[row], vectors[row], rtol=0, atol=0)
            continue
        cosines = {j: float(torch.cosine_similarity(text[row], text[j], dim=0)) for j in range(N) if j not in NEW}
        nearest = sorted(cosines, key=lambda j: -cosines[j])[:neighbours]
        weights = [math.exp(cosines[j] / 0.3) for j in nearest]
        expected = sum(w * vectors[j] for w, j in zip(weights, nearest, strict=True)) * 1.5 / sum(weights)
        torch.testing.assert_close(found[row], expected)


def test_more_new_items_change_no_other_and_without_warm_ones_there_is_nothing() -> None:
    vectors, warm, text = features()
    whole = inherited(vectors, warm, text, Inheritance())
    more = inherited(
        torch.cat((vectors, torch.zeros(2, 5))),
        torch.cat((warm, torch.zeros(2, dtype=torch.bool))),
        torch.cat((text, text[:2])),
        Inheritance(),
    )
    torch.testing.assert_close(more[:N], whole)
    assert not inherited(vectors, torch.zeros_like(warm), text, Inheritance()).sub(vectors).any()


def items(seed: int = 0) -> ItemTable:
    vectors, warm, text = features(seed)
    return ItemTable(N, warm, text, vectors)


def test_a_model_takes_what_is_inherited_for_new_items_also_when_they_come_later() -> None:
    config = SETRec.Config(dim=8, ae_hidden=(6,), semantic_tokens=2, inherit=Inheritance())
    torch.manual_seed(0)
    model, table = SETRec(config, items()).eval(), items()
    vectors = inherited(table.collaborative, table.warm, table.text, Inheritance())
    torch.testing.assert_close(model.collaborative, vectors)
    later = torch.randn(1, 7)
    model.replace_items(
        ItemTable(
            N + 1,
            torch.cat((table.warm, torch.zeros(1, dtype=torch.bool))),
            torch.cat((table.text, later)),
            torch.cat((table.collaborative, torch.zeros(1, 5))),
        )
    )
    assert model.collaborative[N].any()
    torch.testing.assert_close(model.collaborative[:N], vectors)
    loss, _ = model.train().loss(batch_of([[3, 5, 8]], [(0, 1, 5), (0, 2, 8)]))
    loss.backward()
    assert not model.collaborative.requires_grad


def test_an_item_like_one_that_a_user_wants_is_found() -> None:
    """Users who walk through two worlds of text; a new item has the text of the second one's items."""
    random = torch.Generator().manual_seed(0)
    world = torch.arange(N) % 2
    text = torch.randn(2, 7, generator=random)[world] + 0.1 * torch.randn(N, 7, generator=random)
    warm = torch.ones(N, dtype=torch.bool)
    warm[39] = False
    vectors = torch.randn(2, 5, generator=random)[world] + 0.3 * torch.randn(N, 5, generator=random)
    found = {}
    for inherit in (None, Inheritance()):
        torch.manual_seed(0)
        table = ItemTable(N, warm, text, vectors * warm[:, None])
        model = SETRec(SETRec.Config(dim=16, ae_hidden=(8,), semantic_tokens=1, beta=0.1, dropout=0.0, inherit=inherit), table).train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(150):
            rows = [[int(i) for i in torch.randperm(19, generator=random)[:5] * 2 + w] for w in (0, 1) for _ in range(8)]
            batch = batch_of([row[:-1] for row in rows], [(r, 4, row[-1]) for r, row in enumerate(rows)])
            optimizer.zero_grad()
            model.loss(batch)[0].backward()
            optimizer.step()
        with torch.no_grad():
            scores = model.eval().encode(batch_of([[1, 3, 5, 7], [0, 2, 4, 6]])).flat() @ model.item_vectors().T
        found[inherit is not None] = (scores.argsort(1, descending=True) == 39).nonzero()[:, 1].tolist()
    assert found[True][0] < 20 < found[True][1]  # among the items of its world for who likes them, behind them for others
    assert found[True][0] < found[False][0]


def test_without_text_nothing_can_be_inherited() -> None:
    with pytest.raises(ConfigError, match="setrec: inherit: expected text embeddings of all items"):
        codes = items()
        SETRec(SETRec.Config(semantic="codes", inherit=Inheritance()), ItemTable(N, codes.warm, None, codes.collaborative, table_of(N)))
