# SPDX-License-Identifier: Apache-2.0
"""One process of the benchmark: trains through the trainer, times the steps, and profiles some."""

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core.config import validate
from recsys.core.files import write_json
from recsys.core.memory import resident_bytes
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec, TableSpec
from recsys.data.world import World
from recsys.embedding.tables import dense_parameters
from recsys.ranking.models import TokenMixerLarge
from recsys.training.launch import Attempts, join
from recsys.training.progress import NoProgress
from recsys.training.trainer import Trainer

TABLES, ROWS, WIDTH, DENSE = 26, 100_000, 16, 13
WARM, PROFILED = 4, 5
MODEL = {
    "name": "tokenmixer_large",
    "tokenizer": {"name": "groups"},
    "dim": 64,
    "blocks": 2,
    "per_token": {"name": "swiglu", "expansion": 2.0},
    "embedding": {"dim": WIDTH, "learning_rate": 0.05},
}
TRAINER = {"epochs": 1, "optimizer": {"name": "adam", "learning_rate": 1e-3}, "clip_norm": 10.0, "log_every": 1}


def spec() -> InputSpec:
    """26 tables in seven groups, which with the global token make the eight tokens."""
    names = [f"c{i}" for i in range(TABLES)]
    groups = {f"g{i}": tuple(names[i::6]) for i in range(6)} | {"dense": tuple(f"d{i}" for i in range(DENSE))}
    return InputSpec(
        tables=tuple(TableSpec(name=name, rows=ROWS, bags=(name,)) for name in names),
        dense=tuple(f"d{i}" for i in range(DENSE)),
        tasks=("click",),
        groups=groups,
    )


class Steps:
    """A loader whose global batches are drawn by number; notes when each was asked for, and profiles the last ones."""

    def __init__(self, batch: int, steps: int, world: World) -> None:
        self._batch, self._steps, self._world = batch, steps, world
        self.asked: list[float] = []
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self._batches = [self._drawn(step) for step in range(steps)]

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[RankingBatch]:
        for step, batch in enumerate(self._batches):
            if step == self._steps - PROFILED:
                self.profile.start()
            self.asked.append(time.perf_counter())
            yield batch
        self.profile.stop()

    def set_epoch(self, epoch: int) -> None:
        """There is one."""

    def state_dict(self) -> dict[str, int]:
        """Never gone back to."""
        return {"epoch": 0, "samples": 0}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Nothing."""

    def _drawn(self, step: int) -> RankingBatch:
        generator = torch.Generator().manual_seed(step)
        own, _ = self._world.share(self._batch)
        chosen = slice(own.start, own.stop)
        ids = (torch.rand(TABLES, self._batch, generator=generator) ** 4 * ROWS).long()
        dense = torch.randn(self._batch, DENSE, generator=generator)
        logit = dense[:, 0] + (ids % 3 - 1).float().mean(0) * 3
        labels = torch.bernoulli(logit.sigmoid(), generator=generator)[:, None]
        lengths = torch.ones(TABLES * len(own), dtype=torch.int32)
        sparse = KeyedJaggedTensor(keys=[f"c{i}" for i in range(TABLES)], values=ids[:, chosen].flatten(), lengths=lengths)
        none = KeyedJaggedTensor(keys=[], values=torch.zeros(0, dtype=torch.int64), lengths=torch.zeros(0, dtype=torch.int32))
        return RankingBatch(sparse, none, dense[chosen].contiguous(), labels[chosen].contiguous())


def communication(steps: Steps) -> tuple[float, dict[str, float]]:
    """The share of the profiled time in which a collective was under way, and the numbers given to each kind of them in a step."""
    events = [event for event in steps.profile.events() if event.name.startswith("gloo:")]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, until = 0.0, 0.0
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    elapsed = (time.perf_counter() - steps.asked[-PROFILED]) * 1e6
    given: dict[str, float] = {}
    for event in events:
        kind = event.name.removeprefix("gloo:")
        given[kind] = given.get(kind, 0.0) + _numbers(event.input_shapes) / PROFILED
    return busy / elapsed, given


def _numbers(shapes: Any) -> int:
    """Numbers in all tensors whose shapes are given, maybe in lists."""
    if shapes and all(isinstance(size, int) for size in shapes):
        return int(torch.Size(shapes).numel())
    return sum(_numbers(shape) for shape in shapes or () if isinstance(shape, list | tuple))


def main(folder: Path, job: dict[str, Any]) -> None:
    """Train, and write what came out."""
    world = join()
    torch.manual_seed(0)
    ranker = TokenMixerLarge(validate(TokenMixerLarge.Config, MODEL), spec())
    steps = Steps(job["batch"], WARM + job["steps"] + PROFILED, world)
    placements = dict.fromkeys((f"c{i}" for i in range(TABLES)), job["placement"]) if job["placement"] else {}
    trainer = validate(Trainer.Config, TRAINER | {"distribution": {"placements": placements}})
    Trainer(trainer, folder / "run", progress=NoProgress()).fit(ranker, steps)
    taken = [after - before for before, after in zip(steps.asked, steps.asked[1:], strict=False)][WARM : WARM + job["steps"]]
    share, given = communication(steps)
    if world.rank == 0:
        losses = [
            json.loads(line)["batch_loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines() if "batch_loss" in line
        ]
        dense = sum(parameter.numel() for parameter in dense_parameters(ranker))
        about = {"communication": share, "given": given, "dense": dense, "gib": resident_bytes() / 2**30}
        write_json(folder / "result.json", {"seconds": statistics.median(taken), "losses": losses} | about)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Attempts(Path(sys.argv[1])):
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
