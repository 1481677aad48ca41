# SPDX-License-Identifier: Apache-2.0
"""SETRec over the codes of an item tokenizer."""

import pytest
import torch
from vector_quantize_pytorch import FSQ as Oracle

from recsys.core.config import parse
from recsys.core.errors import ConfigError, DataError
from recsys.retrieval.catalogue import Catalogue, DenseIndex
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.codes import code_items
from recsys.retrieval.item_sets import CodeSet
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models import SETRec
from recsys.retrieval.tokenizers import SlicedFSQ
from tests.recsys.retrieval.coded import HISTORIES, TARGETS, batch_of, table_of

N = 60


def items_of(table: CodeTable) -> ItemTable:
    collaborative = torch.randn(2 * N, 5, generator=torch.Generator().manual_seed(2))[: len(table)]
    warm = torch.arange(len(table)) < N - 3
    return ItemTable(len(table), warm, collaborative=collaborative, codes=table)


def build(table: CodeTable | None = None, **config: object) -> SETRec:
    torch.manual_seed(0)
    config = {"dim": 8, "max_length": 6, "dropout": 0.0, "init_std": 0.5, "semantic": "codes", **config}
    return SETRec(SETRec.Config(**config), items_of(table or table_of()))  # type: ignore[arg-type]


def test_a_token_is_the_embedding_of_its_code() -> None:
    torch.manual_seed(0)
    codes = torch.tensor([[0, 3], [2, 1]])
    own = CodeSet((3, 4), 5, None, 1.0)
    expected = torch.stack([torch.stack([own.embedding[code], own.embedding[3 + other]]) for code, other in codes.tolist()])
    torch.testing.assert_close(own(codes), expected)


def test_digits_are_those_of_fsq() -> None:
    levels = (4, 3, 5)
    oracle = Oracle(levels=list(levels))
    values, index = oracle(torch.randn(1, 50, 3))
    digit = (values[0] * torch.tensor([level // 2 for level in levels]) + torch.tensor([level // 2 for level in levels])).round().long()
    own = CodeSet((60, 60), 7, levels, 1.0)
    for slot, first in enumerate((0, 12)):
        codes = torch.zeros(50, 2, dtype=torch.int64)
        codes[:, slot] = index[0].long()
        expected = own.embedding[first + digit[:, 0]] + own.embedding[first + 4 + digit[:, 1]] + own.embedding[first + 7 + digit[:, 2]]
        torch.testing.assert_close(own(codes)[:, slot], expected)


def test_scores_are_the_weighted_sum_over_slots_and_an_index_finds_their_best() -> None:
    model = build(beta=0.3).eval()
    with torch.no_grad():
        tokens = model.tokenize(model.content, model.collaborative)
        state = model.encode(batch_of(HISTORIES))
        expected = torch.einsum("bkd,nkd->bn", state.values, tokens)
        for slot in range(3):
            torch.testing.assert_close(tokens[:, 1 + slot], model.semantic(model.content)[:, slot])
    view = Catalogue([str(i) for i in range(N)]).snapshot()
    rows, scores = DenseIndex.over(DenseIndex.Config(), model, view).search(state, 5, view)
    assert rows.tolist() == expected.topk(5).indices.tolist()
    torch.testing.assert_close(torch.from_numpy(scores), expected.topk(5).values, rtol=1e-4, atol=1e-4)


def test_items_with_the_same_codes_differ_by_their_collaborative_vector_only() -> None:
    codes = table_of().codes.clone()
    codes[1] = codes[0]
    model = build(CodeTable(codes, (5, 5, 5), "t")).eval()
    tokens = model.tokenize(model.content, model.collaborative)
    assert torch.equal(tokens[0, 1:], tokens[1, 1:]) and not torch.equal(tokens[0, 0], tokens[1, 0])


def test_every_embedding_of_a_code_in_use_learns_and_there_is_nothing_to_reconstruct() -> None:
    model = build()
    loss, parts = model.loss(batch_of(HISTORIES, TARGETS))
    loss.backward()
    assert set(parts) == {"cross_entropy"} and torch.equal(parts["cross_entropy"], loss.detach())
    embedding = model.semantic.embedding
    assert isinstance(embedding, torch.nn.Parameter) and embedding.grad is not None
    used = (model.content[model.warm] + torch.tensor([0, 5, 10])).unique()
    assert bool((embedding.grad[used].abs().amax(1) > 0).all())


def test_a_new_item_needs_codes_of_the_same_tokenizer() -> None:
    model = build().eval()
    before = model.encode(batch_of(HISTORIES)).flat() @ model.item_vectors().T
    model.replace_items(items_of(table_of(N + 2)))
    after = model.encode(batch_of(HISTORIES)).flat() @ model.item_vectors().T
    assert after.shape[1] == N + 2
    torch.testing.assert_close(after[:, :N], before)
    with pytest.raises(DataError, match=r"codes: tokenizer: expected t as in training, got u"):
        model.replace_items(items_of(table_of(tokenizer="u")))


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"items\.codes: expected codes of the items, got None"):
        SETRec(SETRec.Config(semantic="codes"), ItemTable(3, torch.ones(3, dtype=torch.bool), collaborative=torch.randn(3, 2)))
    with pytest.raises(ConfigError, match=r"code_digits: \[2, 3\] write 6 codes, but there are 5"):
        build(code_digits=(2, 3))
    codes = {"semantic": "codes"}
    for wrong, message in (
        ({**codes, "compress": True}, "compress"),
        ({"code_digits": [2, 3]}, "code_digits"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(SETRec.Config, wrong, source="recipe.yaml")


def test_learns_over_the_codes_of_fsq() -> None:
    """Users who walk up the catalogue: the next item's text lies near."""
    torch.manual_seed(0)
    place = torch.arange(N)[:, None] / N * 6
    text = torch.cat([f(place * k) for k in (1, 2) for f in (torch.sin, torch.cos)], 1).repeat(1, 4)
    warm = torch.ones(N, dtype=torch.bool)
    config = SlicedFSQ.Config(slots=2, levels=(5, 5, 5), heads=2, layers=1, epochs=30, learning_rate=1e-3)
    tokenizer = SlicedFSQ(config).fit(ItemTable(N, warm, text))
    items = ItemTable(N, warm, text, torch.zeros(N, 2), code_items(tokenizer, ItemTable(N, warm, text)))
    model = SETRec(SETRec.Config(dim=16, max_length=5, dropout=0.0, semantic="codes", code_digits=(5, 5, 5), beta=1.0), items)
    starts = torch.randint(0, N, (200,)).tolist()
    histories = [[(start + i) % N for i in range(5)] for start in starts]
    batch = batch_of(histories, [(row, 5, (start + 5) % N) for row, start in enumerate(starts)])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(batch)[0].backward()
        optimizer.step()
    with torch.no_grad():
        best = (model.eval().encode(batch).flat() @ model.item_vectors().T).topk(3).indices
    assert float((best == torch.tensor([(s + 5) % N for s in starts])[:, None]).any(1).float().mean()) > 0.8
