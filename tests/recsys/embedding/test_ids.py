# SPDX-License-Identifier: Apache-2.0
"""Managed ids: what gets a row, what is evicted, and what is restored."""

import copy
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec, SequenceSpec, TableSpec
from recsys.embedding.ids import ManagedTableConfig
from recsys.embedding.quantize import quantize
from recsys.embedding.tables import EmbeddingTables

POLICIES = ["lfu", "lru", "distance_lfu"]

SPEC = InputSpec(
    tables=(
        TableSpec(name="user", rows=6, bags=("user",), ids="raw"),
        TableSpec(name="item", rows=5, sequences=("history", "target"), ids="raw"),
        TableSpec(name="city", rows=4, bags=("city",)),
    ),
    sequences=(SequenceSpec(name="h", keys=("history",), target="target"),),
    tasks=("click",),
)
BIG = 2**62


def make(policy: str = "lfu", interval: int = 1, seed: int = 0, **options: Any) -> EmbeddingTables:
    torch.manual_seed(seed)
    managed = {name: ManagedTableConfig(policy=policy, interval=interval) for name in ("user", "item")}
    return EmbeddingTables(SPEC, EmbeddingTables.Config(dim=4, init_std=1.0, managed=managed, **options))


def batch(users: list[int], history: list[int] = (), targets: list[int] | None = None) -> RankingBatch:
    """One user and one target per row; the whole history is the first row's."""
    b = len(users)
    targets = targets or [0] * b
    one = [1] * b
    return RankingBatch(
        sparse=KeyedJaggedTensor(keys=["user", "city"], values=torch.tensor([*users, *([2] * b)]), lengths=torch.tensor([*one, *one])),
        sequences=KeyedJaggedTensor(
            keys=["history", "target"],
            values=torch.tensor([*history, *targets], dtype=torch.int64),
            lengths=torch.tensor([len(history), *([0] * (b - 1)), *one]),
        ),
        dense=torch.empty(b, 0),
    )


def user_rows(tables: EmbeddingTables, users: list[int]) -> list[int]:
    mode = tables.training
    rows, _ = tables.eval().ids(batch(users))
    tables.train(mode)
    return rows.sparse["user"].values().tolist()


def weight(tables: EmbeddingTables, table: str = "user") -> Tensor:
    return next(w for name, w in tables.named_parameters() if f".{table}." in name).detach()


@pytest.mark.parametrize("policy", POLICIES)
def test_ids_get_rows_of_their_own(policy: str) -> None:
    tables = make(policy)
    users = [BIG + 1, BIG + 2, 7, 0]
    assert user_rows(tables, users) == [1, 1, 1, 0]
    embedded = tables(batch(users, [3, 4, 3], [3, 0, 5, 4]))
    rows = user_rows(tables, users)
    assert sorted(rows[:3]) == sorted(set(rows[:3])) and min(rows[:3]) >= 2 and rows[3] == 0
    assert torch.equal(embedded.pooled["user"], weight(tables)[rows])
    assert torch.equal(embedded.pooled["city"], weight(tables, "city")[[2] * 4])
    item = weight(tables, "item")
    history, target = embedded.sequences["history"].values(), embedded.sequences["target"].values()
    assert torch.equal(history[0], history[2]) and torch.equal(history[0], target[0]) and torch.equal(history[1], target[3])
    assert torch.equal(target[1], item[0]) and not any(torch.equal(row, item[1]) for row in (*history, *target))
    assert user_rows(tables, [99]) == [1]


@pytest.mark.parametrize("policy", POLICIES)
def test_an_evicted_row_is_reused_and_drawn_anew(policy: str) -> None:
    tables = make(policy)
    for _ in range(2):
        tables(batch([11, 12, 13, 14] * 2)).pooled["user"].sum().backward()
    before, place = weight(tables).clone(), dict(zip((11, 12, 13, 14), user_rows(tables, [11, 12, 13, 14]), strict=True))
    assert sorted(place.values()) == [2, 3, 4, 5]
    moment = tables.fused_state()["pooled.user.weight.momentum_1"]
    assert float(moment[2:].min()) > 0
    for _ in range(5):  # 11 to 13 stay; 14 is no longer seen, and a new id is seen more often than it was
        tables(batch([11, 12, 13] * 3 + [BIG] * 5))
    rows = user_rows(tables, [11, 12, 13, 14, BIG])
    assert rows == [place[11], place[12], place[13], 1, place[14]]
    after = weight(tables)
    assert not torch.equal(after[place[14]], before[place[14]])
    kept = [0, 1, place[11], place[12], place[13]]
    assert torch.equal(after[kept], before[kept])
    moment = tables.fused_state()["pooled.user.weight.momentum_1"]
    assert float(moment[place[14]]) == 0 and float(moment[[place[11], place[12], place[13]]].min()) > 0
    tables(batch([BIG])).pooled["user"].sum().backward()
    assert float(tables.fused_state()["pooled.user.weight.momentum_1"][place[14]]) > 0


def test_policies_differ_in_whom_they_evict() -> None:
    evicted = {}
    for policy in ("lfu", "lru"):
        tables = make(policy)
        tables(batch([11] * 9 + [12, 13, 14]))  # 11 is the most frequent, and never seen again
        tables(batch([12, 13, 14, 14]))
        tables(batch([12, 13, 13, 14]))
        tables(batch([99] * 9))
        evicted[policy] = [user for user in (11, 12, 13, 14) if user_rows(tables, [user]) == [1]]
    assert evicted["lru"] == [11] and evicted["lfu"] == [12]


def test_new_ids_are_drawn_with_the_initial_deviation() -> None:
    spec = InputSpec(tables=(TableSpec(name="user", rows=4002, bags=("user",), ids="raw"), *SPEC.tables[1:]), tasks=())
    torch.manual_seed(0)
    config = EmbeddingTables.Config(dim=8, init_std=0.2, managed={t: ManagedTableConfig(interval=1) for t in ("user", "item")})
    tables = EmbeddingTables(spec, config)
    weight(tables).fill_(50.0)
    tables(batch(list(range(10, 3010))))
    rows = user_rows(tables, list(range(10, 3010)))
    drawn = weight(tables)[rows]
    assert len(set(rows)) == 3000 and abs(float(drawn.std()) - 0.2) < 0.01 and abs(float(drawn.mean())) < 0.01


@pytest.mark.parametrize("policy", POLICIES)
def test_evaluation_changes_nothing(policy: str) -> None:
    tables = make(policy)
    tables(batch([11, 12]))
    state = {name: t.clone() for name, t in tables.state_dict().items()}
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            first = tables.eval()(batch([11, 12, 13, 13, 13])).pooled["user"]
    assert torch.equal(first[2], weight(tables)[1]) and torch.equal(first[:2], weight(tables)[user_rows(tables, [11, 12])])
    assert state.keys() == tables.state_dict().keys()
    assert all(torch.equal(t, state[name]) for name, t in tables.state_dict().items())
    tables.train()(batch([13] * 5))
    assert user_rows(tables, [13]) != [1]


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_resumed_run_is_bit_equal(policy: str, interval: int, tmp_path) -> None:
    def train(tables: EmbeddingTables, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            users = torch.randint(1, 12, (8,)) * (BIG // 12)
            embedded = tables(batch(users.tolist(), torch.randint(1, 9, (6,)).tolist(), torch.randint(1, 9, (8,)).tolist()))
            (embedded.pooled["user"].sin().sum() + embedded.sequences["target"].values().cos().sum()).backward()

    straight, first = make(policy, interval), make(policy, interval)
    train(straight, range(11))
    train(first, range(4))  # not at the end of a round of three
    safetensors.torch.save_file(first.state_dict(), tmp_path / "model.safetensors")
    safetensors.torch.save_file(first.fused_state(), tmp_path / "fused.safetensors")
    resumed, used = make(policy, interval, seed=9), make(policy, interval, seed=9)
    train(used, range(20, 22))
    for tables in (resumed, used):
        tables.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
        tables.load_fused_state(safetensors.torch.load_file(tmp_path / "fused.safetensors"))
    others = [copy.deepcopy(resumed), resumed, used]
    for tables in others:
        train(tables, range(4, 11))
        for name, tensor in straight.state_dict().items():
            assert torch.equal(tensor, tables.state_dict()[name]), name
        assert all(torch.equal(t, tables.fused_state()[name]) for name, t in straight.fused_state().items())
    assert len({row for row in user_rows(straight, [BIG // 12 * i for i in range(1, 12)]) if row > 1}) == 4


def test_a_first_batch_without_ids_is_waited_out() -> None:
    tables = make()
    tables(batch([0, 0]))
    tables(batch([11, 12]))
    rows = user_rows(tables, [11, 12])
    assert rows[0] != rows[1] and min(rows) >= 2


def test_every_id_of_a_long_batch_counts() -> None:
    tables = make("lfu", interval=2)
    tables(batch([11]))
    tables(batch([0] * 20 + [12] * 20, [], [*([0] * 39), 7]))
    assert min(user_rows(tables, [11, 12])) >= 2
    assert tables.eval().ids(batch([0], [7]))[0].sequences["history"].values()[0] >= 2


def test_a_backward_pass_may_follow_the_next_forward_pass() -> None:
    tables = make()
    first = tables(batch([11, 12]))
    second = tables(batch([13, 13, 13, 14, 14, 15, 15]))
    before = weight(tables).clone()
    for embedded in (first, second):
        embedded.pooled["user"].sum().backward()
        assert not torch.equal(weight(tables), before)
        before = weight(tables).clone()


def test_quantised_tables_keep_the_map() -> None:
    tables = make()
    tables(batch([11, 12, 13]))
    quantized = quantize(tables)
    embedded, expected = quantized.train()(batch([11, 12, 99, 0])), tables.eval()(batch([11, 12, 99, 0]))
    torch.testing.assert_close(embedded.pooled["user"], expected.pooled["user"], rtol=0, atol=0.02)
    quantized(batch([99] * 9))
    assert torch.equal(quantized(batch([99])).pooled["user"][0], embedded.pooled["user"][2])
    other = copy.deepcopy(quantized)
    assert torch.equal(other(batch([11, 12, 99, 0])).pooled["user"], embedded.pooled["user"])


def test_bad_configs_name_what_was_expected() -> None:
    with pytest.raises(ConfigError, match=r"embedding.managed: unknown table 'users'; did you mean 'user'\?"):
        EmbeddingTables(SPEC, EmbeddingTables.Config(managed={n: ManagedTableConfig() for n in ("user", "item", "users")}))
    with pytest.raises(ConfigError, match=r"embedding.managed: expected table 'item', whose ids are raw, got \['user'\]"):
        EmbeddingTables(SPEC, EmbeddingTables.Config(managed={"user": ManagedTableConfig()}))
    with pytest.raises(ConfigError, match=r"embedding.managed: table 'city' is given rows, .* expected raw ids"):
        EmbeddingTables(SPEC, EmbeddingTables.Config(managed={n: ManagedTableConfig() for n in ("user", "item", "city")}))
    with pytest.raises(ConfigError, match=r"embedding.managed.user.policy: 'hash_zch' trains on a GPU alone, and this table is on cpu"):
        make("hash_zch")
    small = InputSpec(tables=(TableSpec(name="user", rows=3, bags=("user",), ids="raw"),), tasks=())
    with pytest.raises(ConfigError, match=r"embedding.managed.user: expected a table of at least 4 rows, got 3"):
        EmbeddingTables(small, EmbeddingTables.Config(managed={"user": ManagedTableConfig()}))
    with pytest.raises(ConfigError, match=r"managed.user.policy"):
        parse(EmbeddingTables.Config, {"managed": {"user": {"policy": "fifo"}}}, source="test")
