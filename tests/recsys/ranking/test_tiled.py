# SPDX-License-Identifier: Apache-2.0
"""Candidates of a user share what is the user's: the same predictions, from fewer rows looked up."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from recsys.data.batch import RankingBatch, TiledBatch
from recsys.data.spec import InputSpec
from recsys.embedding.quantize import quantize
from recsys.ranking.history import Reads
from recsys.ranking.model import Ranker
from tests.recsys.ranking.test_every_ranker import VARIANTS, built

OF_USER = frozenset({"user", "seen", "seen_stars"})
ONCE = [OF_USER, frozenset({"user", "item"}), OF_USER | {"item"}, frozenset(), frozenset({"user", "genres", "seen", "seen_stars", "item"})]
USER_OF_ROW = [0, 0, 0, 1, 2, 2, 2, 2, 3]
LENGTHS = [3, 0, 6, 1]  # of the users' histories
PRUNED = {"events": 2, "scorer": {"name": "context"}, "selector": {"name": "top_k"}}
HISTORIES: list[dict[str, Any]] = [
    {"name": "target_attention", "unit": "mlp", "hidden": [5]},
    {"name": "target_attention", "unit": "dot", "heads": 2},
    {"name": "target_attention", "unit": "dot", "pruning": PRUNED},
    {"name": "hstu", "max_length": 5, "vectors": 2, "attention": {"name": "target_attention", "unit": "dot"}},
    {"name": "hstu", "max_length": 5, "candidate": False},
]


@pytest.fixture
def make_pair(make_rows: Any, make_batch: Any) -> Callable[..., tuple[RankingBatch, TiledBatch]]:
    """A batch, and the same with the keys ``once`` there once for each user."""

    def make(once: frozenset[str], lengths: list[int] | None = None) -> tuple[RankingBatch, TiledBatch]:
        users, items = make_rows(lengths or LENGTHS, seed=1), make_rows([2] * len(USER_OF_ROW), seed=2)
        whole = [item | {key: users[u][key] for key in once} for u, item in zip(USER_OF_ROW, items, strict=True)]
        tiled = [row | {key: users[r][key] if r < len(users) else [] for key in once} for r, row in enumerate(whole)]
        return make_batch(whole), TiledBatch(replace(make_batch(tiled), labels=None), len(users), torch.tensor(USER_OF_ROW), once)

    return make


def looked_up(model: Ranker, batch: RankingBatch | TiledBatch) -> tuple[torch.Tensor, int]:
    """What a model predicts, and how many rows of its tables that took."""
    counts: list[int] = []
    hook = model.tables.register_forward_pre_hook(
        lambda _, given: counts.append(given[0].sparse.values().numel() + given[0].sequences.values().numel())
    )
    try:
        return model.predict(batch), sum(counts)
    finally:
        hook.remove()


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_ranker_predicts_the_same_from_fewer_rows(spec: InputSpec, make_pair: Any, variant: str) -> None:
    model = built(spec, variant, embedding={"dim": 8, "init_std": 1.0}).eval()
    whole, tiled = make_pair(OF_USER)
    (expected, many), (got, few) = looked_up(model, whole), looked_up(model, tiled)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert expected.std() > 1e-4
    rows, users = len(USER_OF_ROW), len(LENGTHS)
    of_items = sum(len(whole.sparse["genres"].to_dense()[r]) for r in range(rows)) + rows
    assert many == of_items + rows + 2 * sum(LENGTHS[u] for u in USER_OF_ROW)
    assert few == of_items + users + 2 * sum(LENGTHS)


@pytest.mark.parametrize("once", ONCE, ids=lambda once: ",".join(sorted(once)) or "none")
@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_any_side_may_hold_any_key(spec: InputSpec, make_pair: Any, history: dict[str, Any], once: frozenset[str]) -> None:
    model = built(spec, "dcnv2", history=history, embedding={"dim": 8, "init_std": 1.0}).eval()
    torch.nn.init.normal_(next(p for name, p in model.named_parameters() if name.endswith("empty")))
    for lengths in (LENGTHS, [0, 0, 0, 0]):
        whole, tiled = make_pair(once, lengths)
        torch.testing.assert_close(model.predict(tiled), model.predict(whole), rtol=0, atol=1e-6)


def test_int8_tables_are_looked_up_once_too(spec: InputSpec, make_pair: Any) -> None:
    model = built(spec, "dcnv2", embedding={"dim": 8, "init_std": 1.0}).eval()
    small = model.with_tables(quantize(model.tables))
    whole, tiled = make_pair(OF_USER)
    torch.testing.assert_close(small.predict(tiled), small.predict(whole), rtol=0, atol=1e-6)
    difference = (small.predict(tiled) - model.predict(tiled)).abs().max()
    assert 0 < difference < 0.05
    assert model.tables is not small.tables and model.histories is small.histories


def test_a_projection_of_events_is_computed_once_for_each_event(spec: InputSpec, make_pair: Any) -> None:
    model = built(spec, "token_ranker", history={"name": "target_attention", "unit": "dot"}).eval()
    seen: dict[str, int] = {}
    for name in ("key", "value"):
        layer = getattr(model.histories[0].unit, name)
        layer.register_forward_pre_hook(lambda _, given, name=name: seen.__setitem__(name, len(given[0])))
    whole, tiled = make_pair(OF_USER)
    model.predict(whole)
    assert seen == dict.fromkeys(("key", "value"), sum(LENGTHS[u] for u in USER_OF_ROW))
    model.predict(tiled)
    assert seen == dict.fromkeys(("key", "value"), sum(LENGTHS))


def test_pairs_are_those_of_a_loop() -> None:
    lengths, history_of_row = torch.tensor([2, 0, 3]), torch.tensor([2, 0, 1, 2])
    reads = Reads.shared(lengths, history_of_row)
    first = [0, 2, 2]
    expected = [(row, first[h] + i) for row, h in enumerate(history_of_row.tolist()) for i in range(int(lengths[h]))]
    assert list(zip(reads.row.tolist(), reads.event.tolist(), strict=True)) == expected
    assert reads.lengths.tolist() == [3, 2, 0, 3]


@pytest.mark.parametrize("candidate", [True, False])
def test_hstu_runs_its_layers_over_each_history_once(spec: InputSpec, make_pair: Any, candidate: bool) -> None:
    model = built(spec, "token_ranker", history={"name": "hstu", "max_length": 4, "candidate": candidate}).eval()
    seen: list[torch.Size] = []
    for layer in model.histories[0].layers:
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    model.predict(make_pair(OF_USER)[1])
    assert seen == [torch.Size([len(LENGTHS), 4 - candidate, 8])] * 2
