# SPDX-License-Identifier: Apache-2.0
"""Sharded tables against the unsharded ones: two gloo processes, each with half of the batch."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core.config import validate
from recsys.core.errors import CheckpointError, ConfigError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec, SequenceSpec, TableSpec
from recsys.embedding.sharding import full_state, placements, plan, shard
from recsys.embedding.tables import Embedded, EmbeddingTables, dense_parameters

WORLD, ROWS = 2, 4  # processes, and impressions of each
SPEC = InputSpec(
    tables=(
        TableSpec(name="genre", rows=6, bags=("genres", "top_genre")),
        TableSpec(name="item", rows=9, sequences=("history", "target")),
        TableSpec(name="city", rows=5, bags=("city",)),
        TableSpec(name="rating", rows=5, sequences=("ratings",)),
    ),
    sequences=(SequenceSpec(name="h", keys=("history", "ratings"), target="target"),),
    tasks=("click",),
)
SIZES = {key: table.rows for table in SPEC.tables for key in (*table.bags, *table.sequences)}
CASES: dict[str, dict[str, str] | None] = {
    "rows": dict.fromkeys(("genre", "item", "city", "rating"), "row_wise"),
    "tables": dict.fromkeys(("genre", "item", "city", "rating"), "table_wise"),
    "mixed": {"genre": "row_wise", "city": "table_wise", "item": "row_wise", "rating": "table_wise"},
    "free": None,
}


class Model(nn.Module):
    """Tables and a dense layer; every key weighs differently, so that an exchange of keys would show."""

    def __init__(self, optimizer: str, dims: dict[str, int], device: str = "cpu") -> None:
        super().__init__()
        torch.manual_seed(0)
        config = EmbeddingTables.Config(dim=8, dims=dims, optimizer=optimizer, init_std=1.0, learning_rate=0.1)
        self.tables = EmbeddingTables(SPEC, config, torch.device(device))
        self.dense = nn.ModuleDict({key: nn.Linear(self.tables.widths[key], 1) for key in SIZES})

    def forward(self, batch: RankingBatch) -> Tensor:
        embedded = self.tables(batch)
        total = torch.stack([self.dense[key](vectors) for key, vectors in embedded.pooled.to_dict().items()]).sum(0)[:, 0]
        for key, jagged in embedded.sequences.items():
            row = torch.repeat_interleave(jagged.lengths().long())
            total = total.index_add(0, row, self.dense[key](jagged.values())[:, 0])
        return total


def batches() -> list[RankingBatch]:
    """One for each process."""
    generator = torch.Generator().manual_seed(3)

    def keyed(keys: tuple[str, ...]) -> KeyedJaggedTensor:
        lengths = torch.randint(0, 4, (len(keys), ROWS), generator=generator)
        values = [torch.randint(0, SIZES[k], (int(n.sum()),), generator=generator) for k, n in zip(keys, lengths, strict=True)]
        return KeyedJaggedTensor(keys=list(keys), values=torch.cat(values), lengths=lengths.flatten())

    return [RankingBatch(keyed(SPEC.bag_keys), keyed(SPEC.sequence_keys), torch.empty(ROWS, 0)) for _ in range(WORLD)]


def joined(parts: list[RankingBatch]) -> RankingBatch:
    def keyed(kjts: list[KeyedJaggedTensor]) -> KeyedJaggedTensor:
        jagged = [kjt[key] for key in kjts[0].keys() for kjt in kjts]  # noqa: SIM118
        return KeyedJaggedTensor(
            keys=kjts[0].keys(), values=torch.cat([j.values() for j in jagged]), lengths=torch.cat([j.lengths() for j in jagged])
        )

    return RankingBatch(keyed([p.sparse for p in parts]), keyed([p.sequences for p in parts]), torch.empty(ROWS * len(parts), 0))


def step(model: nn.Module, batch: RankingBatch) -> Tensor:
    """Logits before two steps of training with different losses."""
    dense = torch.optim.SGD(dense_parameters(model), lr=0.1)
    first = model(batch)
    for logits in (first, None):
        dense.zero_grad()
        (model(batch) if logits is None else logits).square().mean().backward()
        dense.step()
    return first.detach()


def compare(case: str, optimizer: str, dims: dict[str, int]) -> None:
    rank, parts = dist.get_rank(), batches()
    whole = Model(optimizer, dims)
    sharded = shard(copy.deepcopy(whole), constraints=CASES[case])
    assert sharded.module.tables.sharded
    assert set(sharded.state_dict()) == set(whole.state_dict())
    fused = set(sharded.fused_optimizer.state_dict()["state"])
    assert fused <= {f"tables.{name}" for name, _ in whole.tables.named_parameters()}, fused
    expected, got = step(whole, joined(parts)), step(sharded, parts[rank])
    torch.testing.assert_close(got, expected[rank * ROWS : (rank + 1) * ROWS], rtol=1e-5, atol=1e-5)
    state = full_state(sharded)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{case} {name}: {text}")
    whole.load_state_dict(state)
    sharded.module.tables.set_learning_rate(0.0)
    step(sharded, parts[rank])
    frozen = full_state(sharded)
    assert sharded.module.tables.learning_rate == 0.0
    assert all(torch.equal(frozen[name], state[name]) for name in state if name.startswith("tables."))
    with pytest.raises(CheckpointError, match="sharded"):
        sharded.module.tables.fused_state()


def reload(directory: Path) -> None:
    """A checkpoint written under one plan is read under another, and training goes on alike."""
    rank, part = dist.get_rank(), batches()[dist.get_rank()]
    one = shard(Model("rowwise_adagrad", {"rating": 4}), constraints=CASES["rows"])
    two = shard(Model("rowwise_adagrad", {"rating": 4}), constraints=CASES["tables"])
    step(one, part)
    dcp.save({"model": one.state_dict(), "fused": one.fused_optimizer.state_dict()}, checkpoint_id=directory / "checkpoint")
    state = {"model": two.state_dict(), "fused": two.fused_optimizer.state_dict()}
    dcp.load(state, checkpoint_id=directory / "checkpoint")
    two.load_state_dict(state["model"])
    two.fused_optimizer.load_state_dict(state["fused"])
    for model in (one, two):
        step(model, part)
    theirs = full_state(two)
    for name, tensor in full_state(one).items():
        torch.testing.assert_close(theirs[name], tensor, msg=lambda text, name=name: f"rank {rank} {name}: {text}")


def unborn() -> None:
    """Tables of the meta device are drawn by the processes that hold them."""
    model = Model("sgd", {"rating": 4})
    with torch.device("meta"):
        model.tables = EmbeddingTables(SPEC, model.tables.config, torch.device("meta"))
    state = full_state(shard(model, constraints=CASES["rows"]))
    for table in ("pooled.embedding_bags.genre", "unpooled.embeddings.item"):
        weight = state[f"tables.{table}.weight"]
        half = (len(weight) + 1) // 2
        assert 0.5 < float(weight.std()) < 1.5 and not torch.equal(weight[: len(weight) - half], weight[half:])


MANAGED = InputSpec(
    tables=(
        TableSpec(name="user", rows=2 + 6 * 2, bags=("user", "friends"), ids="raw"),
        TableSpec(name="city", rows=5, bags=("city",)),
        TableSpec(name="item", rows=2 + 2 * 4, sequences=("history", "target"), ids="raw"),
    ),
    sequences=(SequenceSpec(name="h", keys=("history",), target="target"),),
    tasks=(),
)


def managed_batches(step: int) -> list[RankingBatch]:
    """One for each process; at times the first has no ids, or a row of the second weighs nothing. 0 is no value."""
    generator = torch.Generator().manual_seed(step)

    def keyed(keys: tuple[str, ...], most: int) -> KeyedJaggedTensor:
        lengths = torch.randint(0, most, (len(keys), ROWS), generator=generator)
        values = [
            torch.randint(0, 5 if key == "city" else 40, (int(n.sum()),), generator=generator) * (1 if key == "city" else 3 * 2**50)
            for key, n in zip(keys, lengths, strict=True)
        ]
        return KeyedJaggedTensor(keys=list(keys), values=torch.cat(values), lengths=lengths.flatten())

    made = []
    for rank in range(WORLD):
        most = 1 if rank == 0 and step % 4 == 1 else 4
        batch = RankingBatch(
            keyed(MANAGED.bag_keys, most), keyed(MANAGED.sequence_keys, most), torch.empty(ROWS, 0), None, torch.ones(ROWS)
        )
        made.append(batch.muted(1) if rank and step % 3 == 0 else batch)
    return made


def summed(embedded: Embedded, weights: Tensor) -> Tensor:
    """Of everything that a batch looks up, each row as it weighs."""
    vectors = embedded.pooled.values().sin().sum(1)
    for jagged in embedded.sequences.values():
        vectors = vectors.index_add(0, torch.repeat_interleave(jagged.lengths().long()), jagged.values().cos().sum(1))
    return (vectors * weights).sum() / ROWS


def managed(case: str, optimizer: str, dims: dict[str, int]) -> None:
    """Tables of two processes against one that sees both batches: ids get the same rows, rows the same vectors and accumulators."""
    rank, placement = dist.get_rank(), {"rows": "row_wise", "tables": "table_wise"}[case]
    ids = {"user": {"policy": "lru", "interval": 1, "buckets": 6}, "item": {"policy": "distance_lfu", "interval": 3, "buckets": 2}}
    config = validate(EmbeddingTables.Config, {"dim": 8, "dims": dims, "optimizer": optimizer, "init_std": 1.0, "managed": ids})
    torch.manual_seed(0)
    whole = EmbeddingTables(MANAGED, config)
    wrapped = shard(nn.ModuleDict({"tables": copy.deepcopy(whole)}), constraints=dict.fromkeys(("user", "city", "item"), placement))
    tables = wrapped.module["tables"]
    torch.manual_seed(5 + rank)  # what is drawn anew does not come from here
    evictions: list[int] = []
    whole.ids.register_forward_hook(lambda module, given, result: evictions.extend(len(gone.rows) for gone in result[1].values()))
    for step in range(20):
        parts = managed_batches(step)
        both = joined(parts)
        both.weights = torch.cat([part.weights for part in parts])
        expected = whole(both)
        found = tables(parts[rank])
        for key, vectors in found.pooled.to_dict().items():
            torch.testing.assert_close(vectors, expected.pooled[key][rank * ROWS : (rank + 1) * ROWS], rtol=1e-5, atol=1e-5)
        (summed(expected, both.weights) / WORLD).backward()
        summed(found, parts[rank].weights).backward()
    assert sum(evictions) > 3 * 20
    state = full_state(wrapped)
    assert state.keys() == {f"tables.{name}" for name in whole.state_dict()}
    for name, tensor in whole.state_dict().items():
        other = state[f"tables.{name}"]
        if name.endswith("_extra_state"):  # the order of what was seen is that of the processes
            assert other[:3].tolist() == tensor[:3].tolist() and other.sort()[0].tolist() == tensor.sort()[0].tolist()
        else:
            torch.testing.assert_close(other, tensor, rtol=0 if tensor.dtype == torch.int64 else 1e-4, atol=1e-5, msg=name)
    compared = 0
    for name, accumulator in whole.fused_state().items():
        if name != "learning_rate":
            kind, table, *_ = name.split(".")
            collection = "pooled.embedding_bags" if kind == "pooled" else "unpooled.embeddings"
            sharded = wrapped.fused_optimizer.state_dict()["state"].get(f"tables.{collection}.{table}.weight", {})
            for part in [part for tensor in sharded.values() for part in tensor.local_shards()]:
                first = part.metadata.shard_offsets[0]
                torch.testing.assert_close(part.tensor, accumulator[first : first + len(part.tensor)], rtol=1e-4, atol=1e-6, msg=name)
                compared += 1
    assert compared
    before = state
    for step in range(20, 23):
        parts = managed_batches(step)
        rows = [module.eval().ids(batch)[0] for module, batch in ((whole, joined(parts)), (tables, parts[rank]))]
        for key in ("user", "friends"):
            bags = [each.sparse[key].to_dense() for each in rows]
            assert [bag.tolist() for bag in bags[0][rank * ROWS : (rank + 1) * ROWS]] == [bag.tolist() for bag in bags[1]]
    assert all(torch.equal(tensor, before[name]) for name, tensor in full_state(wrapped).items())


def unborn_managed() -> None:
    """Maps of tables of the meta device are built by the processes that own their buckets."""
    config = validate(EmbeddingTables.Config, {"dim": 8, "managed": {"user": {"interval": 1, "buckets": 6}, "item": {"buckets": 2}}})
    with torch.device("meta"):
        module = nn.ModuleDict({"tables": EmbeddingTables(MANAGED, config, torch.device("meta"))})
    tables = shard(module).module["tables"]
    tables(managed_batches(2)[dist.get_rank()])
    rows = tables.eval().ids(managed_batches(2)[dist.get_rank()])[0].sparse["user"].values()
    assert int(rows.max()) > 1


def main(rank: int, directory: Path, jobs: list[list]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD)
    for name, *arguments in jobs:
        jobs_by_name = {"compare": compare, "reload": lambda: reload(directory), "unborn": unborn}
        (jobs_by_name | {"managed": managed, "unborn_managed": unborn_managed})[name](*arguments)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    def start(*jobs: list) -> None:
        command = [sys.executable, __file__, str(tmp_path), json.dumps(jobs)]
        outputs = [(tmp_path / str(rank)).open("w") for rank in range(WORLD)]
        processes = [
            subprocess.Popen([*command, str(rank)], stderr=subprocess.STDOUT, stdout=output) for rank, output in enumerate(outputs)
        ]
        try:
            codes = [process.wait(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert codes == [0] * WORLD, "\n".join((tmp_path / str(rank)).read_text()[-3000:] for rank in range(WORLD))

    return start


def test_sharded_tables_equal_unsharded_ones(run) -> None:
    mixed = {"rating": 4, "city": 16}
    run(*(["compare", case, "rowwise_adagrad", mixed] for case in CASES), ["compare", "mixed", "sgd", {}], ["reload"], ["unborn"])


def test_sharded_tables_with_managed_ids_equal_unsharded_ones(run) -> None:
    mixed = {"item": 4, "city": 16}
    run(["managed", "rows", "rowwise_adagrad", mixed], ["managed", "tables", "adagrad", {}], ["unborn_managed"])


@pytest.mark.slow
def test_sharded_tables_equal_unsharded_ones_with_every_optimizer(run) -> None:
    run(*(["compare", case, optimizer, dims] for case in CASES for optimizer in ("adagrad", "sgd") for dims in ({}, {"city": 4})))


@pytest.mark.parametrize("rows", [20, 200_000])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_no_plan_is_data_parallel(world: int, rows: int) -> None:
    spec = InputSpec(tables=tuple(t.model_copy(update={"rows": rows}) for t in SPEC.tables), tasks=())
    with torch.device("meta"):
        tables = EmbeddingTables(spec, EmbeddingTables.Config(dim=8), torch.device("meta"))
    chosen = placements(plan(tables, world))
    assert set(chosen) == {"genre", "item", "city", "rating"} and set(chosen.values()) <= {"row_wise", "table_wise"}


def test_constraints_are_kept() -> None:
    model = Model("sgd", {})
    chosen = placements(plan(model, 2, {"genre": "row_wise", "rating": "table_wise", "item": "row_wise"}))
    assert chosen["genre"] == chosen["item"] == "row_wise" and chosen["rating"] == "table_wise"


def test_bad_constraints_are_config_errors() -> None:
    model = Model("sgd", {})
    with pytest.raises(ConfigError, match="constraints: unknown table 'genres'; did you mean 'genre'"):
        plan(model, 2, {"genres": "row_wise"})
    with pytest.raises(ConfigError, match=r"constraints.genre: expected one of table_wise, row_wise, got 'data_parallel'"):
        plan(model, 2, {"genre": "data_parallel"})
    with pytest.raises(ConfigError, match="got both"):
        shard(model, plan=plan(model, 2), constraints={"genre": "row_wise"})


if __name__ == "__main__":
    main(int(sys.argv[3]), Path(sys.argv[1]), json.loads(sys.argv[2]))
