# SPDX-License-Identifier: Apache-2.0
"""One of several processes: retrievers' losses of its shares against those of whole batches, which it takes before it joins the others."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from recsys.core.components import get
from recsys.core.config import validate
from recsys.core.files import write_json
from recsys.data.batch import SequenceBatch
from recsys.data.jagged import Jagged
from recsys.data.sequences import SequenceData
from recsys.data.windows import SequenceLoader
from recsys.data.world import World
from recsys.retrieval.base import Retriever
from recsys.training.launch import join
from tests.recsys.retrieval.coded import N, items_of, table_of
from tests.recsys.retrieval.saving import MODELS

ROUTING = {"efficiency": {"routing": {"budget": 0.45, "rank": 2, "hidden": 4}}}  # no share is just that, where the penalty has a kink
CASES = {
    **{name: (name, {}) for name in MODELS},
    "setrec over codes": ("setrec", {"semantic": "codes"}),
    "routed sasrec": ("sasrec", ROUTING),
    "routed rpg": ("rpg", ROUTING),
}
BATCH = 6
USERS = 2 * BATCH + 1  # each a single window, so that the last batch has one row for all processes
COLD = (3, 11, 30)


def data() -> SequenceData:
    rng = np.random.default_rng(0)
    offsets = np.append(0, np.cumsum(rng.integers(2, 8, USERS)))
    return SequenceData.from_order([str(user) for user in range(USERS)], Jagged(rng.integers(0, N, offsets[-1]), offsets))


def model(case: str) -> Retriever:
    torch.manual_seed(0)
    name, changed = CASES[case]
    warm = torch.ones(N, dtype=torch.bool)
    warm[list(COLD)] = False
    vectors = torch.randn(N, 5, generator=torch.Generator().manual_seed(2))
    items = replace(items_of(table_of()), warm=warm, collaborative=vectors)
    cls = get("retriever", name)
    made: Retriever = cls(validate(cls.Config, {"name": name, **MODELS[name], **changed}), items)
    return made.double().train()


def measured(case: str, world: World) -> Iterator[list[Tensor]]:
    """The loss of each batch, or of this process's share, and its gradients."""
    retriever = model(case)
    for batch in SequenceLoader(data(), 6, BATCH, seed=1, world=world):
        if "routed" in case and len(batch) * world.size < BATCH:
            continue  # a row that stands in for one that is lacking is routed like any other
        yield [loss_of(retriever, batch), *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in retriever.parameters())]


def loss_of(retriever: Retriever, batch: SequenceBatch) -> Tensor:
    retriever.zero_grad()
    loss, _ = retriever.loss(batch)
    loss.backward()
    return loss.detach()


def main(folder: Path) -> None:
    wholes = {case: list(measured(case, World())) for case in CASES}
    world = join()
    found = {}
    for case, expected in wholes.items():
        worst, batches = 0.0, list(measured(case, world))
        for parts, whole in zip(batches, expected, strict=True):
            for part, tensor in zip(parts, whole, strict=True):
                dist.all_reduce(part)
                worst = max(worst, float((part / world.size - tensor).abs().max()))
        largest = [max(float(tensor.abs().max()) for tensor in whole[1:]) for whole in expected]
        found[case] = {"difference": worst, "losses": [float(whole[0]) for whole in expected], "gradients": largest}
    if world.rank == 0:
        write_json(folder / "found.json", found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
