# SPDX-License-Identifier: Apache-2.0
"""One process of a retriever's training, as torchrun or Ray Train starts it, and whatever is to go wrong."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from recsys.core.components import get
from recsys.core.config import validate
from recsys.data.augment import Augmentation
from recsys.data.batch import SequenceBatch
from recsys.data.jagged import Jagged
from recsys.data.leave_one_out import leave_one_out
from recsys.data.sequences import SequenceData
from recsys.data.windows import SequenceLoader
from recsys.data.world import World
from recsys.evaluation.metrics.ranking import ndcg_at
from recsys.evaluation.retrieval import model_ranks
from recsys.evaluation.together import shared_ranks
from recsys.retrieval.base import Retriever
from recsys.retrieval.catalogue import Catalogue
from recsys.retrieval.items import ItemTable
from recsys.training.launch import Attempts, join
from recsys.training.progress import NoProgress
from recsys.training.trainer import Trainer, Validate
from tests.recsys.training.distributed.worker import attempt_of, faults_of, write_result

EVENTS = 150
PLAIN = {"dim": 16, "blocks": 2, "heads": 2, "dropout": 0.0, "max_length": 6, "init_std": 0.2}
MODELS: dict[str, dict[str, Any]] = {"sasrec": PLAIN, "setrec": {**PLAIN, "semantic_tokens": 2, "ae_hidden": [8]}}
WINDOWS = SequenceLoader.Config(stride=3, augmentation=Augmentation(reverse=0.3, jitter=0.5))


def data() -> SequenceData:
    """Users of 3 to 12 events, each event of an item of its own, so that a target says which event it was."""
    rng = np.random.default_rng(0)
    cuts = np.cumsum(rng.integers(3, 13, EVENTS))
    offsets = np.array([0, *cuts[cuts < EVENTS - 3], EVENTS])
    return SequenceData.from_order([f"u{user}" for user in range(len(offsets) - 1)], Jagged(rng.permutation(EVENTS), offsets))


def model(name: str, **changed: Any) -> Retriever:
    torch.manual_seed(7)
    random = torch.Generator().manual_seed(1)
    text, vectors = (torch.randn(EVENTS, width, generator=random) for width in (10, 5))
    items = ItemTable(EVENTS, torch.ones(EVENTS, dtype=torch.bool), text, vectors)
    cls = get("retriever", name)
    made: Retriever = cls(validate(cls.Config, {"name": name, **MODELS[name], **changed}), items)
    return made


def loader(world: World) -> SequenceLoader:
    return SequenceLoader(data(), 6, 8, seed=3, config=WINDOWS, world=world)


def validation() -> Validate:
    steps, view = leave_one_out(data()).valid, Catalogue([str(row) for row in range(EVENTS)]).snapshot()

    def valid(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Retriever)
        return {"ndcg": float(ndcg_at(shared_ranks(lambda some: model_ranks(module, data(), some, view), steps), 10).mean())}

    return valid


class Recorded:
    """Writes which events were targets; does something at chosen steps."""

    def __init__(self, folder: Path, attempt: str, faults: dict[int, Callable[[Any], None]], own: SequenceLoader) -> None:
        self.folder, self.attempt, self.faults, self.own = folder, attempt, faults, own
        self.batch_size = own.batch_size

    def __len__(self) -> int:
        return len(self.own)

    def __iter__(self) -> Iterator[SequenceBatch]:
        for batch in self.own:
            cursor = self.own.state_dict()
            step = cursor["epoch"] * len(self) + -(-cursor["samples"] // self.batch_size)
            assert batch.targets is not None
            line = {"attempt": self.attempt, "step": step, "epoch": cursor["epoch"], "rows": batch.targets.tolist()}
            with (self.folder / f"rows-{self.own.world.rank}.jsonl").open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            if step in self.faults:
                self.faults[step](batch)
            yield batch

    def set_epoch(self, epoch: int) -> None:
        self.own.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        return self.own.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.own.load_state_dict(state)


def main(folder: Path, job: dict[str, Any]) -> None:
    world = join()
    attempt = attempt_of(folder, world.rank)
    retriever = model(job["model"], **job.get("changed", {}))
    trainer = Trainer(validate(Trainer.Config, job["trainer"]), folder / "run", progress=NoProgress(), context={"seed": 7})
    faults = faults_of(job, world.rank, attempt)
    history = trainer.fit(retriever, Recorded(folder, f"{job.get('launch', 0)}.{attempt}", faults, loader(world)), validation())
    write_result(folder, world.rank, retriever, history)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Attempts(Path(sys.argv[1])):
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
