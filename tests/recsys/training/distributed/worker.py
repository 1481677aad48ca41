# SPDX-License-Identifier: Apache-2.0
"""One process of a training, as torchrun starts it: a ranker with tables of every kind, and whatever is to go wrong."""

import hashlib
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core.config import validate
from recsys.data.batch import RankingBatch, SequenceBatch
from recsys.data.loader import TableLoader
from recsys.data.spec import InputSpec, SequenceSpec, TableSpec
from recsys.data.world import World
from recsys.embedding.sharding import full_state
from recsys.evaluation.together import predictions
from recsys.ranking.model import Ranker
from recsys.ranking.models import DCNv2
from recsys.ranking.token_ranker import TokenRanker
from recsys.training.history import History
from recsys.training.launch import RUN, Attempts, join
from recsys.training.progress import NoProgress
from recsys.training.trainer import Trainer

SPEC = InputSpec(
    tables=(
        TableSpec(name="genre", rows=12, bags=("genres",)),
        TableSpec(name="item", rows=30, sequences=("history", "target")),
        TableSpec(name="city", rows=24, bags=("city",)),
    ),
    sequences=(SequenceSpec(name="h", keys=("history",), target="target"),),
    dense=("x",),
    tasks=("click", "like"),
)
MANAGED = InputSpec(
    tables=(
        SPEC.tables[0],
        TableSpec(name="item", rows=2 + 12 * 3, sequences=("history", "target"), ids="raw"),
        TableSpec(name="city", rows=2 + 12 * 2, bags=("city",), ids="raw"),
    ),
    sequences=SPEC.sequences,
    dense=SPEC.dense,
    tasks=SPEC.tasks,
)
"""With raw ids, of which there are far more than rows."""
RAW = {"history": 150, "target": 150, "city": 60}  # how many ids there are
ROWS = 101  # with batches of 12 the last one has five rows, fewer than six processes
SPOILT = 0.123456789


def data(rows: int = ROWS, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)

    def ragged(high: int, least: int) -> list[list[int]]:
        return [rng.integers(0, high, rng.integers(least, 5)).tolist() for _ in range(rows)]

    item, x = rng.integers(0, 30, rows), rng.normal(size=rows)
    click = (x + item % 3 - 1 + rng.normal(size=rows) > 0).astype(float)
    like = np.where(rng.random(rows) < 0.4, np.nan, (item % 2).astype(float))
    columns = {"row": np.arange(rows), "genres": ragged(12, 0), "history": ragged(30, 0), "target": item, "city": rng.integers(0, 24, rows)}
    return pa.table(columns | {"x": x, "click": click, "like": like})


def to_batch(table: pa.Table) -> RankingBatch:
    def keyed(keys: tuple[str, ...]) -> KeyedJaggedTensor:
        lists = {key: [v if isinstance(v, list) else [v] for v in table[key].to_pylist()] for key in keys}
        values = [value for key in keys for bag in lists[key] for value in bag]
        lengths = [len(bag) for key in keys for bag in lists[key]]
        return KeyedJaggedTensor(
            keys=list(keys), values=torch.tensor(values, dtype=torch.int64), lengths=torch.tensor(lengths, dtype=torch.int32)
        )

    labels = np.stack([table[task].to_numpy() for task in SPEC.tasks], 1).astype(np.float32)
    dense = torch.from_numpy(table["x"].to_numpy().astype(np.float32))[:, None]
    return RankingBatch(keyed(SPEC.bag_keys), keyed(SPEC.sequence_keys), dense, torch.from_numpy(labels))


def managed_data(rows: int = ROWS, seed: int = 0) -> pa.Table:
    """Some ids are frequent, and others become so as the rows go on."""
    table, rng = data(rows, seed), np.random.default_rng(seed + 100)

    def drawn(key: str, lengths: list[int]) -> list[list[int]]:
        return [((rng.geometric(0.03, n) + row // 3) % RAW[key] * 12 * 2**40).tolist() for row, n in enumerate(lengths)]

    columns = {"history": drawn("history", [3] * rows)} | {key: [i for (i,) in drawn(key, [1] * rows)] for key in ("target", "city")}
    for key, values in columns.items():
        table = table.set_column(table.column_names.index(key), key, pa.array(values))
    return table


class Spoilt(DCNv2):
    """Where a batch has a certain number, the loss is finite and its gradient is not."""

    def loss(self, batch: RankingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = super().loss(batch)
        if bool((batch.dense == SPOILT).any()):
            loss = loss + (loss - loss.detach()).sqrt()
        return loss, parts


def tokens() -> TokenRanker:
    """Blocks that add penalties to the loss, and readouts below the last one."""
    torch.manual_seed(7)
    settings: dict[str, Any] = {
        "name": "token_ranker",
        "dim": 8,
        "blocks": 3,
        "mixer": {"name": "self_attention", "heads": 2},
        "per_token": {"name": "relu_moe", "expansion": 4, "experts": 4},  # smooth, unlike a choice of experts
        "stack": {"name": "pre_norm"},
        "auxiliary": "deep_supervision",
        "embedding": {"dim": 8, "dims": {"city": 4}, "learning_rate": 0.001, "init_std": 0.3},
    }
    return TokenRanker(validate(TokenRanker.Config, settings), SPEC)


def model(dropout: float = 0.0, managed: bool = False) -> DCNv2:
    torch.manual_seed(7)
    settings: dict[str, Any] = {
        "name": "dcnv2",
        "hidden": [16],
        "dropout": dropout,
        "embedding": {"dim": 8, "dims": {"city": 4}, "learning_rate": 0.1, "init_std": 0.3},
        "history": {"name": "target_attention", "unit": "mlp", "hidden": [8]},
    }
    if managed:
        policies = {"item": {"policy": "distance_lfu", "interval": 2}, "city": {"policy": "lru", "interval": 5}}
        settings["embedding"]["managed"] = {table: policy | {"buckets": 12} for table, policy in policies.items()}
    return Spoilt(validate(DCNv2.Config, settings), MANAGED if managed else SPEC)


class Recorded(TableLoader[RankingBatch]):
    """Writes which rows were trained on; does something at chosen steps."""

    def __init__(
        self, folder: Path, world: World, attempt: str, faults: dict[int, Callable[[RankingBatch], None]], table: pa.Table
    ) -> None:
        self.folder, self.attempt, self.faults = folder, attempt, faults
        self._seen: list[list[int]] = []
        super().__init__(table, self._remembered, batch_size=12, seed=3, world=world, prefetch=2)

    def _remembered(self, table: pa.Table) -> RankingBatch:
        self._seen.append(table["row"].to_pylist())
        return to_batch(table)

    def __iter__(self) -> Iterator[RankingBatch]:
        self._seen.clear()
        for place, batch in enumerate(super().__iter__()):
            step = self._epoch * len(self) + -(-self._samples // self.batch_size)
            line = {"attempt": self.attempt, "step": step, "epoch": self._epoch, "rows": _real(self._seen[place], batch)}
            with (self.folder / f"rows-{self.world.rank}.jsonl").open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            if step in self.faults:
                self.faults[step](batch)
            yield batch


def _real(rows: list[int], batch: RankingBatch) -> list[int]:
    """The rows that weigh something: the others are there so that all processes have as many."""
    return rows if batch.weights is None else [row for row, weight in zip(rows, batch.weights.tolist(), strict=True) if weight]


def full_disk(_: RankingBatch) -> None:
    """From now on no file of this process can grow beyond 3,000 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def ask_to_end(launcher: int) -> None:
    """SIGTERM to the process that started all, and time for it to hand it on."""
    os.kill(launcher, signal.SIGTERM)
    time.sleep(3)


def poisoned(batch: RankingBatch | SequenceBatch) -> None:
    """A label of infinity makes the loss infinite; a target that nothing has been seen for cannot be predicted."""
    if isinstance(batch, SequenceBatch):
        assert batch.target_position is not None
        batch.target_position[0] = 99
        return
    assert batch.labels is not None
    batch.labels[0, 0] = torch.inf


def overflowing(batch: RankingBatch) -> None:
    """A number that is finite, and too large: a loss that is not, found behind the forward pass."""
    batch.dense[0, 0] = 3e38


def spoilt(batch: RankingBatch) -> None:
    """What `Spoilt` looks for."""
    batch.dense[0, 0] = SPOILT


def validation(table: pa.Table) -> Callable[[nn.Module], dict[str, float]]:
    """The loss of the clicks of a table, which all processes of the group predict together."""
    check = list(TableLoader(table, to_batch, batch_size=12, shuffle=False, world=World.current()))
    labels = torch.from_numpy(table["click"].to_numpy())

    def valid(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Ranker)
        probability = predictions(lambda batch: module.predict(batch)[:, 0].numpy(), check, table.num_rows, 12)
        return {"loss": float(functional.binary_cross_entropy(torch.from_numpy(probability).double(), labels))}

    return valid


def attempt_of(folder: Path, rank: int) -> int:
    """How often this process of this launch was started before; Ray Train does not say."""
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        return int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    with (folder / f"starts-{os.environ[RUN]}-{rank}").open("a") as stream:
        stream.write("+")
        return stream.tell() - 1


def faults_of(job: dict[str, Any], rank: int, attempt: int) -> dict[int, Callable[[Any], None]]:
    """What is to go wrong in this process, by step."""
    acts: dict[str, Callable[[Any], None]] = {
        "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
        "kill_all": lambda _: os.killpg(os.getpgrp(), signal.SIGKILL),
        "term": lambda _: os.kill(os.getpid(), signal.SIGTERM),
        "term_launcher": lambda _: ask_to_end(job["launcher"]),
        "hang": lambda _: time.sleep(3600),
        "poison": poisoned,
        "overflow": overflowing,
        "spoil": spoilt,
        "full": full_disk,
    }
    mine = [f for f in job.get("faults", ()) if f.get("rank", rank) == rank and f.get("attempt", attempt) == attempt]
    return {fault["at"]: acts[fault["what"]] for fault in mine}


def write_result(folder: Path, rank: int, model: nn.Module, history: History) -> None:
    """The weights and the course of the training, by the first process; all make the call."""
    state = full_state(model)
    if rank == 0:
        digest = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "weights.safetensors")
        (folder / "result.json").write_text(json.dumps({"rows": history.rows(), "skipped": history.skipped, "weights": digest}))
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path, job: dict[str, Any]) -> None:
    world = join()
    if job.get("loud"):
        logging.basicConfig(level=logging.INFO, force=True)
    attempt = attempt_of(folder, world.rank)
    faults = faults_of(job, world.rank, attempt)
    made = managed_data if job.get("managed") else data
    ranker = tokens() if job.get("tokens") else model(job.get("dropout", 0.0), job.get("managed", False))
    trainer = Trainer(validate(Trainer.Config, job["trainer"]), folder / "run", progress=NoProgress(), context={"seed": 7})
    history = trainer.fit(
        ranker, Recorded(folder, world, f"{job.get('launch', 0)}.{attempt}", faults, made()), validation(made(41, seed=1))
    )
    write_result(folder, world.rank, ranker, history)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Attempts(Path(sys.argv[1])):
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
