# SPDX-License-Identifier: Apache-2.0
"""Tables of several widths, and rankers on top of them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec, SequenceSpec, TableSpec
from recsys.embedding.tables import EmbeddingTables
from recsys.ranking.history import TargetAttention
from recsys.ranking.token_ranker import TokenRanker

SPEC = InputSpec(
    tables=(
        TableSpec(name="genre", rows=6, bags=("genres", "top_genre")),
        TableSpec(name="item", rows=9, sequences=("history", "target")),
        TableSpec(name="city", rows=4, bags=("city",)),
        TableSpec(name="rating", rows=5, sequences=("ratings",)),
        TableSpec(name="age", rows=7, sequences=("ages",)),
    ),
    sequences=(SequenceSpec(name="h", keys=("history", "ratings", "ages"), target="target"),),
    dense=("price",),
    tasks=("click",),
)
DIMS = {"city": 16, "rating": 4, "genre": 12}
WIDTH = {"genre": 12, "item": 8, "city": 16, "rating": 4, "age": 8}
TABLE_OF = {key: table for table in SPEC.tables for key in (*table.bags, *table.sequences)}


def config(**options: Any) -> EmbeddingTables.Config:
    return EmbeddingTables.Config(**({"dim": 8, "dims": DIMS, "init_std": 1.0, "learning_rate": 0.1} | options))


def make(**options: Any) -> EmbeddingTables:
    torch.manual_seed(0)
    return EmbeddingTables(SPEC, config(**options))


def random_batch(seed: int = 1, rows: int = 5) -> RankingBatch:
    generator = torch.Generator().manual_seed(seed)
    history = torch.randint(0, 4, (rows,), generator=generator)

    def keyed(keys: tuple[str, ...]) -> KeyedJaggedTensor:
        lengths = {key: torch.randint(0, 4, (rows,), generator=generator) for key in SPEC.bag_keys}
        lengths |= {"history": history, "ratings": history, "ages": history, "target": torch.ones(rows, dtype=torch.int64)}
        values = [torch.randint(0, TABLE_OF[k].rows, (int(lengths[k].sum()),), generator=generator) for k in keys]
        return KeyedJaggedTensor(keys=list(keys), values=torch.cat(values), lengths=torch.cat([lengths[k] for k in keys]))

    labels = torch.randint(0, 2, (rows, 1), generator=generator).float()
    return RankingBatch(keyed(SPEC.bag_keys), keyed(SPEC.sequence_keys), torch.randn(rows, 1, generator=generator), labels)


def weights(tables: EmbeddingTables) -> dict[str, Tensor]:
    return {name.split(".")[-2]: w.detach().clone() for name, w in tables.named_parameters()}


def looked_up(weight: dict[str, Tensor], batch: RankingBatch) -> dict[str, Tensor]:
    result = {}
    for key, jagged in (batch.sparse.to_dict() | batch.sequences.to_dict()).items():
        table = TABLE_OF[key]
        if table.bags:
            result[key] = F.embedding_bag(jagged.values(), weight[table.name], jagged.offsets()[:-1].long(), mode="sum")
        else:
            result[key] = F.embedding(jagged.values(), weight[table.name])
    return result


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_lookups_and_training_equal_torch(optimizer: str) -> None:
    tables = make(optimizer=optimizer)
    slow = {name: w.double().requires_grad_() for name, w in weights(tables).items()}
    assert {name: w.shape[1] for name, w in slow.items()} == WIDTH
    moment = {name: torch.zeros_like(w if optimizer == "adagrad" else w[:, :1]) for name, w in slow.items()}
    for seed in range(4):
        batch = random_batch(seed)
        embedded = tables(batch)
        got = embedded.pooled.to_dict() | {key: jagged.values() for key, jagged in embedded.sequences.items()}
        expected = looked_up(slow, batch)
        assert tuple(embedded.pooled.keys()) == SPEC.bag_keys and tuple(embedded.sequences) == SPEC.sequence_keys
        for key in expected:
            torch.testing.assert_close(got[key].double(), expected[key], rtol=1e-4, atol=1e-5)
            assert got[key].shape[1] == tables.widths[key] == WIDTH[TABLE_OF[key].name]
        for vectors in (got, expected):
            sum(v.sin().sum() * (i + 1) for i, v in enumerate(vectors[key] for key in TABLE_OF)).backward()
        for name, w in slow.items():
            grad = torch.zeros_like(w) if w.grad is None else w.grad
            if optimizer == "sgd":
                update = 0.1 * grad
            else:
                moment[name] = moment[name] + (grad**2 if optimizer == "adagrad" else (grad**2).mean(1, keepdim=True))
                update = torch.where(grad == 0, 0.0, 0.1 * grad / (moment[name].sqrt() + 1e-8))
            slow[name] = (w - update).detach().requires_grad_()
            torch.testing.assert_close(weights(tables)[name].double(), slow[name].detach(), rtol=1e-4, atol=1e-5)


def test_names_are_those_of_one_width() -> None:
    tables, plain = make(), make(dims={})
    assert list(tables.state_dict()) == list(plain.state_dict())
    assert set(tables.fused_state()) == set(plain.fused_state())
    other = make(init_std=0.1)
    tables(random_batch()).sequences["ratings"].values().sum().backward()
    other.load_state_dict(tables.state_dict())
    other.load_fused_state(tables.fused_state())
    assert all(torch.equal(w, weights(tables)[name]) for name, w in weights(other).items())
    assert all(torch.equal(t, tables.fused_state()[name]) for name, t in other.fused_state().items())
    assert float(tables.fused_state()["unpooled.rating.weight.momentum_1"].max()) > 0


def test_the_learning_rate_reaches_every_width() -> None:
    tables = make(optimizer="sgd")
    tables.set_learning_rate(0.0)
    before, batch = weights(tables), random_batch()
    for lr in (0.0, 0.5):
        tables.set_learning_rate(lr)
        embedded = tables(batch)
        (embedded.pooled.values().sum() + sum(j.values().sum() for j in embedded.sequences.values())).backward()
        assert {bool(torch.equal(w, before[name])) for name, w in weights(tables).items()} == {lr == 0.0}


@pytest.mark.parametrize("dims", [{}, DIMS, {"item": 16}])
def test_a_ranker_takes_each_key_at_its_width(dims: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = TokenRanker(TokenRanker.Config(embedding=config(dims=dims), dim=24, history=TargetAttention.Config(unit="dot")), SPEC)
    width = {t.name: dims.get(t.name, 8) for t in SPEC.tables}
    expected = {"genres": width["genre"], "top_genre": width["genre"], "city": width["city"], "target": width["item"], "h": width["item"]}
    assert model.widths == expected | {"price": 1} and list(model.widths) == [*expected, "price"]
    projections = [(layer.in_features, layer.out_features) for layer in model.histories[0].extras]
    assert projections == [(width["rating"], width["item"]), (width["age"], width["item"])]
    batch = random_batch()
    fields = model.fields(model.embed(batch), batch)
    assert fields.shape[1] == sum(model.widths.values())
    before = weights(model.tables)
    model.loss(batch)[0].backward()
    assert all(parameter.grad is not None for parameter in model.histories[0].extras.parameters())
    assert not any(torch.equal(w, before[name]) for name, w in weights(model.tables).items())
    assert torch.equal(copy.deepcopy(model)(batch), model(batch))


def test_unknown_tables_and_bad_widths_are_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"embedding.dims: unknown table 'genres'; did you mean 'genre'\?"):
        make(dims={"genres": 8})
    with pytest.raises(ConfigError, match=r"dims.city: Input should be a multiple of 4"):
        parse(EmbeddingTables.Config, {"dims": {"city": 6}}, source="test")
    assert parse(EmbeddingTables.Config, {"dims": {"city": 8}}, source="test").dims == {"city": 8}
