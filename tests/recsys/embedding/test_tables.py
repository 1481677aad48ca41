# SPDX-License-Identifier: Apache-2.0
"""Embedding tables against dense torch lookups and optimizers written out by hand."""

import copy
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core.config import parse
from recsys.core.errors import CheckpointError, ConfigError, RecsysError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec, SequenceSpec, TableSpec
from recsys.embedding.tables import EmbeddingTables, dense_parameters

SPEC = InputSpec(
    tables=(
        TableSpec(name="genre", rows=6, bags=("genres", "top_genre")),
        TableSpec(name="item", rows=9, sequences=("history", "target")),
        TableSpec(name="city", rows=4, bags=("city",)),
        TableSpec(name="rating", rows=5, sequences=("ratings",)),
    ),
    sequences=(SequenceSpec(name="h", keys=("history", "ratings"), target="target"),),
    tasks=("click",),
)
KEYS = {"pooled": SPEC.bag_keys, "unpooled": SPEC.sequence_keys}
TABLE_OF = {key: (table.name, table.rows) for table in SPEC.tables for key in (*table.bags, *table.sequences)}
DIM = 4


def make(seed: int = 0, spec: InputSpec = SPEC, **options: Any) -> EmbeddingTables:
    torch.manual_seed(seed)
    return EmbeddingTables(spec, EmbeddingTables.Config(**({"dim": DIM, "init_std": 1.0, "learning_rate": 0.1} | options)))


def random_batch(generator: torch.Generator, rows: int = 7, longest: int = 4, spec: InputSpec = SPEC) -> RankingBatch:
    def jagged(keys: tuple[str, ...]) -> KeyedJaggedTensor:
        lengths = torch.randint(0, longest + 1, (len(keys), rows), generator=generator, dtype=torch.int32)
        values = [torch.randint(0, TABLE_OF[k][1], (int(n.sum()),), generator=generator) for k, n in zip(keys, lengths, strict=True)]
        return KeyedJaggedTensor(
            keys=list(keys), values=torch.cat(values) if keys else torch.empty(0).long(), lengths=lengths.flatten(), stride=rows
        )

    return RankingBatch(sparse=jagged(spec.bag_keys), sequences=jagged(spec.sequence_keys), dense=torch.empty(rows, 0))


def weights(tables: EmbeddingTables) -> dict[str, Tensor]:
    """By table."""
    return {name.split(".")[-2]: w.detach().clone() for name, w in tables.named_parameters()}


def reference(weight: dict[str, Tensor], batch: RankingBatch, pooling: str = "sum") -> dict[str, Tensor]:
    """The same lookups with torch's own embedding and embedding_bag."""
    result = {}
    for key, jagged in (batch.sparse.to_dict() | batch.sequences.to_dict()).items():
        table = weight[TABLE_OF[key][0]]
        if key in KEYS["pooled"]:
            result[key] = F.embedding_bag(jagged.values(), table, jagged.offsets()[:-1].long(), mode=pooling)
        else:
            result[key] = F.embedding(jagged.values(), table)
    return result


def looked_up(tables: EmbeddingTables, batch: RankingBatch) -> dict[str, Tensor]:
    embedded = tables(batch)
    return embedded.pooled.to_dict() | {key: jagged.values() for key, jagged in embedded.sequences.items()}


def loss_of(vectors: dict[str, Tensor], coefficients: dict[str, Tensor]) -> Tensor:
    """A nonlinear loss, so that the gradients depend on the weights."""
    return torch.stack([(torch.sin(v) * coefficients[k][: v.shape[0]].to(v.dtype)).sum() for k, v in vectors.items()]).sum()


def coefficients(generator: torch.Generator) -> dict[str, Tensor]:
    return {key: 3 * torch.randn(64, DIM, generator=generator) for key in TABLE_OF}


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_lookups_equal_torch(pooling: str) -> None:
    tables = make(pooling=pooling)
    batch = random_batch(torch.Generator().manual_seed(1))
    embedded = tables(batch)
    assert tuple(embedded.pooled.keys()) == SPEC.bag_keys and tuple(embedded.sequences) == SPEC.sequence_keys
    for key, expected in reference(weights(tables), batch, pooling).items():
        torch.testing.assert_close(looked_up(tables, batch)[key], expected)
    for key, jagged in embedded.sequences.items():
        assert torch.equal(jagged.lengths(), batch.sequences[key].lengths())


def test_keys_are_found_by_name_in_any_order_of_the_batch() -> None:
    tables = make()
    batch = random_batch(torch.Generator().manual_seed(1))
    order = list(range(len(SPEC.bag_keys)))[::-1], [2, 0, 1]
    shuffled = RankingBatch(sparse=batch.sparse.permute(order[0]), sequences=batch.sequences.permute(order[1]), dense=batch.dense)
    for key, vectors in looked_up(tables, batch).items():
        assert torch.equal(vectors, looked_up(tables, shuffled)[key])


class SlowTrainer:
    """Dense gradients by autograd in float64, and the optimizers as their docstrings define them."""

    def __init__(self, tables: EmbeddingTables) -> None:
        self.config = tables.config
        self.weight = {name: w.double() for name, w in weights(tables).items()}
        self.moment = {name: torch.zeros_like(w if self.config.optimizer == "adagrad" else w[:, :1]) for name, w in self.weight.items()}

    def step(self, batch: RankingBatch, coefficient: dict[str, Tensor], lr: float) -> None:
        leaves = {name: w.clone().requires_grad_() for name, w in self.weight.items()}
        vectors = reference(leaves, batch, self.config.pooling)
        limit = self.config.max_gradient
        if limit is not None:
            for v in vectors.values():
                v.register_hook(lambda grad: grad.clamp(-limit, limit))
        loss_of(vectors, coefficient).backward()
        for name, leaf in leaves.items():
            grad = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            if self.config.optimizer == "sgd":
                self.weight[name] -= lr * grad
                continue
            self.moment[name] += grad**2 if self.config.optimizer == "adagrad" else (grad**2).mean(1, keepdim=True)
            update = lr * grad / (self.moment[name].sqrt() + self.config.eps)
            self.weight[name] -= torch.where(grad == 0, 0.0, update)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("limit", [None, 0.3])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_training_equals_an_optimizer_by_hand(optimizer: str, limit: float | None, pooling: str) -> None:
    tables = make(optimizer=optimizer, max_gradient=limit, pooling=pooling, eps=1e-3)
    slow = SlowTrainer(tables)
    generator = torch.Generator().manual_seed(2)
    for step in range(5):
        batch, coefficient = random_batch(generator), coefficients(generator)
        lr = 0.1 / (1 + step)
        tables.set_learning_rate(lr)
        loss_of(looked_up(tables, batch), coefficient).backward()
        slow.step(batch, coefficient, lr)
        for name, weight in weights(tables).items():
            torch.testing.assert_close(weight.double(), slow.weight[name], rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in tables.parameters())


def test_the_gradient_clips_before_duplicates_are_summed() -> None:
    tables = make(optimizer="sgd", max_gradient=0.5, learning_rate=1.0)
    before = weights(tables)["city"]
    batch = random_batch(torch.Generator().manual_seed(1), rows=3)
    lengths = torch.ones(9, dtype=torch.int32)
    batch.sparse = KeyedJaggedTensor(keys=list(SPEC.bag_keys), values=torch.tensor([0, 0, 0, 0, 0, 0, 3, 3, 1]), lengths=lengths)
    (tables(batch).pooled["city"] * 100).sum().backward()
    change = weights(tables)["city"] - before
    torch.testing.assert_close(change, torch.tensor([0.0, -0.5, 0.0, -1.0])[:, None].expand(4, DIM))


def test_training_stops_at_a_learning_rate_of_zero() -> None:
    tables = make()
    generator = torch.Generator().manual_seed(2)
    batch, coefficient = random_batch(generator), coefficients(generator)

    def moved() -> bool:
        before = weights(tables)
        loss_of(looked_up(tables, batch), coefficient).backward()
        return any(not torch.equal(before[name], w) for name, w in weights(tables).items())

    assert moved() and tables.learning_rate == pytest.approx(0.1)
    tables.set_learning_rate(0.0)
    assert not moved() and tables.learning_rate == 0.0
    for optimizer in tables.fused_optimizers():
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
    assert moved()
    assert not torch.equal(weights(tables)["item"], weights(make())["item"])


def test_a_schedule_of_torch_reaches_fbgemm() -> None:
    tables = make(optimizer="sgd")
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for optimizer in tables.fused_optimizers()]
    generator = torch.Generator().manual_seed(2)
    batch = random_batch(generator)
    changes = []
    for _ in range(2):
        before = weights(tables)
        sum(v.sum() for v in looked_up(tables, batch).values()).backward()
        changes.append({name: w - before[name] for name, w in weights(tables).items()})
        for optimizer, schedule in zip(tables.fused_optimizers(), schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.step()
    for name, first in changes[0].items():
        torch.testing.assert_close(changes[1][name], first / 2)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_a_resumed_run_is_bit_equal(optimizer: str, tmp_path) -> None:
    def train(tables: EmbeddingTables, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            batch = random_batch(generator)
            loss_of(looked_up(tables, batch), coefficients(generator)).backward()

    straight, first = make(optimizer=optimizer), make(optimizer=optimizer)
    for tables in (straight, first):
        tables.set_learning_rate(0.07)
    train(straight, range(6))
    train(first, range(3))
    safetensors.torch.save_file(first.state_dict(), tmp_path / "model.safetensors")
    safetensors.torch.save_file(first.fused_state(), tmp_path / "fused.safetensors")
    train(first, range(3, 5))
    resumed = make(seed=99, optimizer=optimizer)
    resumed.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    resumed.load_fused_state(safetensors.torch.load_file(tmp_path / "fused.safetensors"))
    train(resumed, range(3, 6))
    for name, weight in weights(straight).items():
        assert torch.equal(weight, weights(resumed)[name])
    for name, tensor in straight.fused_state().items():
        assert torch.equal(tensor, resumed.fused_state()[name])


def test_names_are_stable() -> None:
    tables = make()
    names = ["pooled.embedding_bags.genre.weight", "pooled.embedding_bags.city.weight"]
    names += ["unpooled.embeddings.item.weight", "unpooled.embeddings.rating.weight"]
    assert list(tables.state_dict()) == names == [name for name, _ in tables.named_parameters()]
    state = {name: tuple(t.shape) for name, t in tables.fused_state().items()}
    assert state == {
        "pooled.genre.weight.momentum_1": (6,),
        "pooled.city.weight.momentum_1": (4,),
        "unpooled.item.weight.momentum_1": (9,),
        "unpooled.rating.weight.momentum_1": (5,),
        "learning_rate": (),
    }


def test_state_of_other_tables_is_refused() -> None:
    tables = make()
    with pytest.raises(CheckpointError, match=r"'pooled.city.weight.momentum_1': expected \(4,\), got \(4, 4\)"):
        tables.load_fused_state(make(optimizer="adagrad").fused_state())
    with pytest.raises(CheckpointError, match=r"'pooled.city.weight.momentum_1': expected None, got"):
        make(optimizer="sgd").load_fused_state(tables.fused_state())


def test_initial_weights_follow_the_seed_and_the_deviation() -> None:
    big = InputSpec(tables=(TableSpec(name="t", rows=5000, bags=("t",)), TableSpec(name="s", rows=5000, sequences=("s",))), tasks=())
    one, same, other = (make(seed=s, spec=big, init_std=0.03) for s in (1, 1, 2))
    for name, weight in weights(one).items():
        assert torch.equal(weight, weights(same)[name]) and not torch.equal(weight, weights(other)[name])
        assert abs(float(weight.std()) - 0.03) < 0.001 and abs(float(weight.mean())) < 0.001


def test_evaluation_changes_nothing() -> None:
    tables = make().eval()
    batch = random_batch(torch.Generator().manual_seed(1))
    expected, before, state = looked_up(tables, batch), weights(tables), tables.fused_state()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            again = random_batch(torch.Generator().manual_seed(1))
            for key, vectors in looked_up(tables, again).items():
                assert torch.equal(vectors, expected[key]) and not vectors.requires_grad
    assert all(torch.equal(w, before[name]) for name, w in weights(tables).items())
    assert all(torch.equal(t, state[name]) for name, t in tables.fused_state().items())
    loss_of(looked_up(tables.train(), batch), coefficients(torch.Generator().manual_seed(1))).backward()
    assert not torch.equal(weights(tables)["item"], before["item"])


@pytest.mark.parametrize("rows", [1, 3])
def test_empty_bags_and_histories(rows: int) -> None:
    tables = make()
    batch = random_batch(torch.Generator().manual_seed(1), rows=rows, longest=0)
    embedded = tables(batch)
    assert all(torch.equal(v, torch.zeros(rows, DIM)) for v in embedded.pooled.to_dict().values())
    assert all(j.values().shape == (0, DIM) and j.lengths().tolist() == [0] * rows for j in embedded.sequences.values())
    before = weights(tables)
    sum(v.sum() for v in looked_up(tables, batch).values()).backward()
    assert all(torch.equal(w, before[name]) for name, w in weights(tables).items())


@pytest.mark.parametrize("kind", ["pooled", "unpooled"])
def test_a_spec_of_one_kind(kind: str) -> None:
    spec = InputSpec(tables=tuple(t for t in SPEC.tables if bool(t.bags) == (kind == "pooled")), tasks=())
    tables = make(spec=spec)
    vectors = looked_up(tables, random_batch(torch.Generator().manual_seed(1), spec=spec))
    assert tuple(vectors) == KEYS[kind] and len(tables.fused_optimizers()) == 1
    none = make(spec=InputSpec(tables=(), dense=("x",), tasks=()))
    assert looked_up(none, random_batch(torch.Generator(), spec=none.spec)) == {}
    none.load_fused_state(none.fused_state())


@pytest.mark.parametrize("key", ["city", "target"])
def test_a_row_beyond_the_table_is_an_error(key: str) -> None:
    tables = make()
    batch = random_batch(torch.Generator().manual_seed(1), longest=2)
    part = batch.sparse if key == "city" else batch.sequences
    part[key].values()[0] = TABLE_OF[key][1]
    with pytest.raises(RuntimeError, match="idx < num_rows"):
        tables(batch)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = make()
        self.head = nn.Linear(DIM, 1)

    def forward(self, batch: RankingBatch) -> Tensor:
        embedded = self.tables(batch)
        return self.head(embedded.pooled["city"] + embedded.sequences["target"].to_padded_dense(1)[:, 0])


def test_a_dense_optimizer_takes_the_other_parameters_and_harms_none() -> None:
    model = Model()
    assert list(map(id, dense_parameters(model))) == list(map(id, model.head.parameters()))
    assert list(dense_parameters(model.tables)) == []
    generator = torch.Generator().manual_seed(1)
    batch = random_batch(generator)
    model(batch).sum().backward()
    trained = weights(model.tables)
    torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5).step()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert all(torch.equal(w, trained[name]) for name, w in weights(model.tables).items())


def test_a_small_model_learns() -> None:
    model = Model()
    model.tables.set_learning_rate(0.5)
    dense = torch.optim.Adam(dense_parameters(model), lr=0.05)
    lengths = torch.ones(8, dtype=torch.int32)
    target = torch.tensor([0, 1] * 4).float()[:, None]
    cities = torch.tensor([2, 3] * 4)
    batch = RankingBatch(
        sparse=KeyedJaggedTensor(keys=list(SPEC.bag_keys), values=cities.repeat(3), lengths=lengths.repeat(3)),
        sequences=KeyedJaggedTensor(keys=list(SPEC.sequence_keys), values=cities.repeat(3), lengths=lengths.repeat(3)),
        dense=torch.empty(8, 0),
    )
    losses = []
    for _ in range(30):
        loss = F.binary_cross_entropy_with_logits(model(batch), target)
        dense.zero_grad()
        loss.backward()
        dense.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 < 0.3 < losses[0]


def test_a_deep_copy_trains_on_its_own() -> None:
    model = Model().eval()
    batch = random_batch(torch.Generator().manual_seed(1))
    model(batch).sum().backward()
    random_state = torch.get_rng_state()
    other = copy.deepcopy(model)
    assert torch.equal(random_state, torch.get_rng_state()) and not other.tables.training
    before = weights(model.tables)
    assert all(torch.equal(w, before[name]) for name, w in weights(other.tables).items())
    other(batch).sum().backward()
    assert all(torch.equal(w, before[name]) for name, w in weights(model.tables).items())
    assert not torch.equal(weights(other.tables)["city"], before["city"])
    model(batch).sum().backward()
    assert all(torch.equal(w, weights(model.tables)[name]) for name, w in weights(other.tables).items())


def test_moves_casts_and_assignments_are_refused() -> None:
    model = Model().to("cpu").float()
    batch = random_batch(torch.Generator().manual_seed(1))
    before = weights(model.tables)
    model(batch).sum().backward()
    assert not torch.equal(weights(model.tables)["city"], before["city"])
    with pytest.raises(RecsysError, match="cannot be moved, cast or assigned to: FBGEMM holds their memory on cpu"):
        Model().double()
    with pytest.raises(RecsysError, match="assign=False"):
        Model().load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def test_a_dimension_that_fbgemm_cannot_take_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="dim: Input should be a multiple of 4"):
        parse(EmbeddingTables.Config, {"dim": 6}, source="test")


def test_the_penalty_shrinks_what_was_looked_up_and_nothing_else() -> None:
    tables, batch = make(optimizer="sgd", learning_rate=0.1, l2=0.5), random_batch(torch.Generator().manual_seed(2))
    before = {name: w.requires_grad_() for name, w in weights(tables).items()}
    penalty = tables.penalty(tables(batch))
    expected = 0.25 * sum(v.square().sum() for v in reference(before, batch).values()) / len(batch)
    torch.testing.assert_close(penalty, expected)
    penalty.backward()
    expected.backward()
    for name, weight in weights(tables).items():
        torch.testing.assert_close(weight, before[name].detach() - 0.1 * before[name].grad)
    assert make().penalty(make()(batch)) is None


@pytest.mark.parametrize("name", ["items", "keys", "a.b"])
def test_a_table_that_no_module_can_hold_is_named(name: str) -> None:
    spec = InputSpec(tables=(TableSpec(name=name, rows=5, bags=("x",)),), tasks=("click",))
    with pytest.raises(ConfigError, match=f"table '{name}': expected a name without dots that torch.nn.ModuleDict does not use"):
        make(spec=spec)
