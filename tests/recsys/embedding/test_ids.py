# SPDX-License-Identifier: Apache-2.0
"""Hashed ids and managed ids: what is stable, what collides, what is evicted, and what is restored."""

import copy
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from scipy.stats import chisquare
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core.config import parse
from recsys.core.errors import ConfigError, SchemaError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec, SequenceSpec, TableSpec
from recsys.embedding.hashing import hash64, hashed_rows, raw_ids, sharing
from recsys.embedding.ids import ManagedTableConfig
from recsys.embedding.quantize import quantise
from recsys.embedding.tables import EmbeddingTables

POLICIES = ["lfu", "lru", "distance_lfu"]
WORDS = ["", "a", "b", "ab", "ba", "aa", "user/1", "user/11", "ä€𝄞", "x" * 1000, "1", "2"]


# Hashing


@pytest.mark.parametrize("seed", [0, 7])
def test_a_hash_does_not_depend_on_the_layout(seed: int) -> None:
    expected = hash64(pa.array(WORDS), seed)
    assert expected.dtype == np.uint64 and len(set(expected.tolist())) == len(WORDS)
    layouts = [pa.array(WORDS, type=t) for t in (pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())]
    layouts += [
        pa.array(WORDS).dictionary_encode(),
        pa.chunked_array([WORDS[:3], WORDS[3:3], WORDS[3:]]),
        pa.array(["?", *WORDS, "?"])[1:-1],
    ]
    for layout in layouts:
        assert np.array_equal(hash64(layout, seed), expected), layout.type
    for i, word in enumerate(WORDS):
        assert hash64(pa.array([word]), seed)[0] == expected[i]


def test_a_hash_of_strings_is_that_of_its_definition() -> None:
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    def slow(data: bytes, seed: int) -> int:
        total = sum(mix(i << 8 | byte) for i, byte in enumerate(data)) + len(data) * 0x94D049BB133111EB
        return mix((total & mask) ^ mix(seed & mask))

    for seed in (0, 3, -1):
        assert hash64(pa.array(WORDS), seed).tolist() == [slow(word.encode(), seed) for word in WORDS]
        assert hash64(pa.array([5, -5]), seed).tolist() == [mix((x & mask) ^ mix(seed & mask)) for x in (5, -5)]
    assert mix(0) == 0xE220A8397B1DCDAF  # SplitMix64's published first output for seed 0


def test_a_hash_is_the_same_in_another_process() -> None:
    code = "import pyarrow as pa; from recsys.embedding.hashing import hash64; print(hash64(pa.array(['a', 'user/1'])).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5"})
    assert printed.stdout.strip() == str(hash64(pa.array(["a", "user/1"])).tolist())


def test_numbers_hash_alike_in_every_integer_type() -> None:
    numbers = [0, 1, 2, 100, 127]
    expected = hash64(pa.array(numbers, type=pa.int64()))
    for t in (pa.int8(), pa.uint8(), pa.int32(), pa.uint64()):
        assert np.array_equal(hash64(pa.array(numbers, type=t)), expected)
    assert hash64(pa.array([2**64 - 1], type=pa.uint64())).shape == (1,)
    assert hash64(pa.array(["1"]))[0] != hash64(pa.array([1]))[0]
    many = np.arange(-50_000, 50_000)
    assert len(np.unique(hash64(pa.array(many)))) == len(many) == len(np.unique(hash64(pa.array(many.astype(str)))))
    for bad in (pa.array([1.0]), pa.array([True]), pa.array([["a"]])):
        with pytest.raises(SchemaError, match="expected strings, binary or integers"):
            hash64(bad)


def test_nulls_have_the_row_of_no_value() -> None:
    words = ["a", None, "b"]
    layouts = pa.array(words), pa.array([1, None, 2]), pa.chunked_array([words[:2], words[2:]]), pa.array(words).dictionary_encode()
    for values in layouts:
        rows, ids = hashed_rows(values, 50), raw_ids(values)
        assert rows[1] == 0 == ids[1] and rows.dtype == ids.dtype == np.int64
        assert rows[[0, 2]].min() >= 2 and rows.max() < 50 and ids[[0, 2]].min() >= 1 and ids.max() <= 2**63 - 2
    assert hashed_rows(pa.array([], type=pa.string()), 5).shape == raw_ids(pa.array([], type=pa.int64())).shape == (0,)
    assert hashed_rows(pa.nulls(2, pa.string()), 5).tolist() == [0, 0]
    with pytest.raises(ConfigError, match="at least 3"):
        hashed_rows(pa.array(["a"]), 2)


@pytest.mark.parametrize("kind", ["numbers", "strings"])
def test_rows_are_uniform_and_the_sharing_is_the_expected_one(kind: str) -> None:
    ids, rows = 20_000, 10_002
    values = np.arange(ids) * 64
    hashed = hashed_rows(pa.array(values if kind == "numbers" else [f"item/{v:08d}" for v in values]), rows)
    assert chisquare(np.bincount(hashed - 2, minlength=rows - 2)).pvalue > 1e-4
    used = Counter(hashed.tolist())
    shared = sum(n for n in used.values() if n > 1) / ids
    assert shared == pytest.approx(sharing(ids, rows), abs=0.02) and 0.8 < shared < 0.9
    assert sharing(10**6, 10**6 + 2) == pytest.approx(1 - np.exp(-1), abs=1e-3) and sharing(10**4, 10**6) < 0.01
    assert sharing(1, 100) == 0.0 and sharing(5, 3) == 1.0
    other = hashed_rows(pa.array(values), rows, seed=1)
    assert np.mean(other == hashed) < 0.001


# Managed ids

SPEC = InputSpec(
    tables=(
        TableSpec(name="user", rows=6, bags=("user",)),
        TableSpec(name="item", rows=5, sequences=("history", "target")),
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
    spec = InputSpec(tables=(TableSpec(name="user", rows=4002, bags=("user",)), *SPEC.tables[1:]), tasks=())
    torch.manual_seed(0)
    config = EmbeddingTables.Config(dim=8, init_std=0.2, managed={"user": ManagedTableConfig(interval=1)})
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
    quantised = quantise(tables)
    embedded, expected = quantised.train()(batch([11, 12, 99, 0])), tables.eval()(batch([11, 12, 99, 0]))
    torch.testing.assert_close(embedded.pooled["user"], expected.pooled["user"], rtol=0, atol=0.02)
    quantised(batch([99] * 9))
    assert torch.equal(quantised(batch([99])).pooled["user"][0], embedded.pooled["user"][2])
    other = copy.deepcopy(quantised)
    assert torch.equal(other(batch([11, 12, 99, 0])).pooled["user"], embedded.pooled["user"])


def test_bad_configs_name_what_was_expected() -> None:
    with pytest.raises(ConfigError, match=r"embedding.managed: unknown table 'users'; did you mean 'user'\?"):
        EmbeddingTables(SPEC, EmbeddingTables.Config(managed={"users": ManagedTableConfig()}))
    with pytest.raises(ConfigError, match=r"embedding.managed.user.policy: 'hash_zch' trains on a GPU alone, and this table is on cpu"):
        make("hash_zch")
    small = InputSpec(tables=(TableSpec(name="user", rows=3, bags=("user",)),), tasks=())
    with pytest.raises(ConfigError, match=r"embedding.managed.user: expected a table of at least 4 rows, got 3"):
        EmbeddingTables(small, EmbeddingTables.Config(managed={"user": ManagedTableConfig()}))
    with pytest.raises(ConfigError, match=r"managed.user.policy"):
        parse(EmbeddingTables.Config, {"managed": {"user": {"policy": "fifo"}}}, source="test")
