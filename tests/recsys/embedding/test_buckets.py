# SPDX-License-Identifier: Apache-2.0
"""Buckets of managed ids: which id is in which, and that each is a map of its own, whoever owns it."""

import copy

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core.errors import CheckpointError, ConfigError
from recsys.data.batch import RankingBatch
from recsys.data.encoding.hashing import hash64
from recsys.data.spec import InputSpec, TableSpec
from recsys.data.world import World
from recsys.embedding.buckets import GOLDEN, mix
from recsys.embedding.ids import ManagedIds, ManagedTableConfig
from recsys.embedding.quantize import quantize
from recsys.embedding.renewal import normal
from recsys.embedding.sharding import HoldsShards
from recsys.embedding.tables import EmbeddingTables

CPU = torch.device("cpu")
POLICIES = ["lfu", "lru", "distance_lfu"]


def spec(rows: int) -> InputSpec:
    return InputSpec(tables=(TableSpec(name="user", rows=rows, bags=("user",), ids="raw"),), tasks=())


def managed(rows: int, buckets: int, policy: str = "lfu", interval: int = 1) -> ManagedIds:
    return ManagedIds(spec(rows), {"user": ManagedTableConfig(policy=policy, interval=interval, buckets=buckets)}, CPU)


def batch(ids: list[int] | Tensor, weights: list[float] | None = None) -> RankingBatch:
    values = torch.as_tensor(ids, dtype=torch.int64)
    sparse = KeyedJaggedTensor(keys=["user"], values=values, lengths=torch.ones(len(values), dtype=torch.int64))
    none = KeyedJaggedTensor(keys=[], values=torch.empty(0, dtype=torch.int64), lengths=torch.empty(0, dtype=torch.int64))
    return RankingBatch(sparse, none, torch.empty(len(values), 0), weights=None if weights is None else torch.tensor(weights))


def rows(ids: ManagedIds, values: list[int] | Tensor) -> list[int]:
    mode = ids.training
    found = ids.eval()(batch(values))[0].sparse["user"].values().tolist()
    ids.train(mode)
    return found


def test_mix_is_that_of_splitmix64() -> None:
    """The first numbers of the generator with the seed 1234567, as its author's program prints them."""
    states = 1234567 + torch.arange(1, 6) * GOLDEN
    printed = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [x % 2**64 for x in mix(states).tolist()] == printed


def test_mix_is_the_arrays_one() -> None:
    numbers = np.random.default_rng(0).integers(-(2**63), 2**63, 1000)
    key = int(mix(torch.tensor([GOLDEN])))
    mixed = mix((torch.from_numpy(numbers) ^ key) + GOLDEN).numpy().view(np.uint64)
    assert np.array_equal(mixed, hash64(pa.array(numbers)))


@pytest.mark.parametrize("buckets", [2, 7, 12, 64])
@pytest.mark.parametrize("step", [1, 12, 64, 2**20, 12 * 2**40, 2**45])
def test_ids_are_even_over_buckets_whatever_their_step(step: int, buckets: int) -> None:
    ids = 1 + torch.arange(100_000) * step if step == 1 else torch.arange(1, 100_001) * step
    counts = torch.bincount(mix(ids) % buckets, minlength=buckets).numpy()
    assert stats.chisquare(counts).pvalue > 1e-4


def test_normal_vectors_are_normal_and_those_of_their_keys() -> None:
    keys = torch.arange(40_000) * 2**32
    drawn = normal(keys, 8)
    assert drawn.dtype == torch.float32
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-3
    correlations = np.corrcoef(drawn.T.numpy()) - np.eye(8)
    assert np.abs(correlations).max() < 0.025
    order = torch.randperm(40_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(normal(keys[order], 8), drawn[order])
    assert torch.equal(normal(keys[17:18], 8)[0], drawn[17])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", POLICIES)
def test_a_table_in_buckets_is_as_many_tables_without(policy: str, seed: int) -> None:
    """Each of the others is fed with the ids of its bucket alone."""
    rng = np.random.default_rng(seed)
    buckets, slots, interval = int(rng.integers(2, 9)), int(rng.integers(2, 6)), int(rng.integers(1, 4))
    together = managed(2 + buckets * slots, buckets, policy, interval)
    apart = [managed(2 + slots, 1, policy, interval) for _ in range(buckets)]
    gone_of = np.zeros(buckets, dtype=int)
    for _ in range(25):
        ids = torch.from_numpy(rng.zipf(1.3, rng.integers(0, 40)) % 97) * 2**50
        own = mix(ids) % buckets
        found, gone = together(batch(ids))
        expected = torch.zeros_like(ids)
        changed = []
        for number, other in enumerate(apart):
            part, left = other(batch(ids[own == number]))
            low = part.sparse["user"].values()
            expected[own == number] = torch.where(low < 2, low, low + number * slots)
            changed += [row + number * slots for row in (left["user"].rows.tolist() if left else [])]
            gone_of[number] += len(left["user"].rows) if left else 0
        assert torch.equal(found.sparse["user"].values(), expected)
        assert (gone["user"].rows.tolist() if gone else []) == changed
    assert gone_of.sum() > buckets * slots


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_shares_of_all_processes_are_the_whole(world: int) -> None:
    whole = managed(2 + 12 * 3, 12, "distance_lfu", 2)
    for step in range(5):
        whole(batch([1 + i * (step + 1) for i in range(40)]))
    state, parts = whole.state_dict(), {}
    before = rows(whole, list(range(1, 60)))
    for rank in range(world):
        ids = copy.deepcopy(whole)
        assert isinstance(ids, HoldsShards) and ids.shard_state() == {}
        ids.share(World(rank, world), CPU)
        assert not ids.state_dict() and not list(ids.buffers())
        own = ids.shard_state()
        assert len(own) == len(state) / world and not own.keys() & parts.keys()
        parts |= own
    assert parts.keys() == state.keys() and all(torch.equal(parts[name], tensor) for name, tensor in state.items())
    other = managed(2 + 12 * 3, 12, "distance_lfu", 2)
    other.share(World(0, 1), CPU)
    other.load_shard_state(parts)
    assert rows(other, list(range(1, 60))) == before and any(row > 1 for row in before)
    again = whole(batch(list(range(1, 60)))), other(batch(list(range(1, 60))))
    assert torch.equal(again[0][0].sparse["user"].values(), again[1][0].sparse["user"].values())
    assert torch.equal(again[0][1]["user"].keys, again[1][1]["user"].keys)


def test_buckets_follow_the_mode_once_they_are_shared() -> None:
    ids = managed(2 + 4 * 2, 4)
    ids.share(World(), CPU)
    ids.eval()(batch([5] * 3))
    assert rows(ids, [5]) == [1]
    ids.train()(batch([5] * 3))
    assert rows(ids, [5])[0] > 1


@pytest.mark.parametrize("buckets", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_row_of_weight_0_holds_is_mapped_and_does_not_count(policy: str, buckets: int) -> None:
    ids = managed(2 + 3 * 2, buckets, policy)
    found, _ = ids(batch([5, 6, 5, 0], [1, 0, 0, 0]))
    assert found.sparse["user"].values()[0] > 1 and found.sparse["user"].values().tolist()[1::2] == [1, 0]
    assert found.sparse["user"].values()[0] == found.sparse["user"].values()[2]
    other = managed(2 + 3 * 2, buckets, policy)
    other(batch([5]))
    for name, tensor in other.state_dict().items():
        if not name.endswith("_extra_state"):
            assert torch.equal(ids.state_dict()[name], tensor), name


def test_one_bucket_has_the_names_and_the_state_of_a_table_without_buckets() -> None:
    ids = managed(7, 1)
    ids(batch([11, 12]))
    state = ids.state_dict()
    assert all(name.startswith(("tables.user.map.", "tables.user._extra_state")) for name in state)
    assert "buckets" not in ManagedTableConfig().model_dump() and ManagedTableConfig(buckets=2).model_dump()["buckets"] == 2
    assert ManagedTableConfig.model_validate(ManagedTableConfig().model_dump()) == ManagedTableConfig()
    old = state | {"tables.user._extra_state": state["tables.user._extra_state"][:-1]}  # before there were seeds
    other = managed(7, 1)
    other.load_state_dict(old)
    assert rows(other, [11, 12, 13]) == rows(ids, [11, 12, 13])


def test_another_seed_another_table_and_another_round_draw_other_vectors() -> None:
    found = []
    for seed, name in ((0, "user"), (1, "user"), (0, "customer")):
        torch.manual_seed(seed)
        own = InputSpec(tables=(TableSpec(name=name, rows=4, bags=("user",), ids="raw"),), tasks=())
        ids = ManagedIds(own, {name: ManagedTableConfig(policy="lru", interval=1)}, CPU)
        for first in (10, 20):
            found += ids(batch([first, first + 1]))[1][name].keys.tolist()
    assert len(set(found)) == len(found) == 3 * 2 * 2


def test_tables_in_buckets_are_copied_quantised_and_trained() -> None:
    torch.manual_seed(0)
    config = EmbeddingTables.Config(dim=4, init_std=1.0, managed={"user": ManagedTableConfig(interval=1, buckets=3)})
    tables = EmbeddingTables(spec(2 + 3 * 4), config)
    tables(batch(list(range(1, 9)))).pooled["user"].sum().backward()
    other = copy.deepcopy(tables)
    for each in (tables, other):
        each(batch([*range(20, 40)] * 2)).pooled["user"].sum().backward()
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in tables.state_dict().items())
    asked = batch([1, 5, 20, 25, 39, 0])
    torch.testing.assert_close(quantize(tables)(asked).pooled["user"], tables.eval()(asked).pooled["user"], rtol=0, atol=0.02)


def test_numbers_that_do_not_divide_are_errors() -> None:
    message = r"embedding.managed.user.buckets: 10 rows, but for the first 2, do not divide into 3 buckets; 11 rows would"
    with pytest.raises(ConfigError, match=message):
        managed(10, 3)
    assert managed(11, 3)
    with pytest.raises(ConfigError, match=r"embedding.managed.user: expected a table of at least 8 rows, got 7"):
        managed(7, 3)
    ids = managed(2 + 12 * 2, 12)
    state = ids.state_dict()
    message = r"embedding.managed.user.buckets: 12 buckets cannot be shared by 5 processes; expected a multiple of 5"
    with pytest.raises(ConfigError, match=message):
        ids.share(World(0, 5), CPU)
    assert ids.state_dict().keys() == state.keys()


def test_a_state_of_other_buckets_is_refused() -> None:
    ids, other = managed(2 + 4 * 3, 4), managed(2 + 4 * 2, 4)
    for each in (ids, other):
        each.share(World(), CPU)
    with pytest.raises(CheckpointError, match=r"managed ids: tables.user.0.map._mch_sorted_raw_ids: expected \(4,\), got \(3,\)"):
        ids.load_shard_state(other.shard_state())
    absent = {name: tensor for name, tensor in ids.shard_state().items() if not name.startswith("tables.user.2.")}
    with pytest.raises(CheckpointError, match=r"managed ids: tables.user.2._extra_state: expected \(4,\), got None"):
        ids.load_shard_state(absent)
