# SPDX-License-Identifier: Apache-2.0
"""One process that trains a few steps and says what it holds: ``counted.py FOLDER retriever|ranker replicated|sharded``."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from recsys.core.config import validate
from recsys.data.batch import SequenceBatch
from recsys.data.loader import TableLoader
from recsys.data.world import World
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models.sasrec import SASRec
from recsys.training.launch import join
from recsys.training.optim import DenseOptimizer
from recsys.training.parallel import Distribution, Together
from tests.recsys.training.distributed import worker

STEPS, ROWS, ITEMS, LENGTH = 6, 12, 31, 5
CLIP = 0.1


def held(tensor: Tensor) -> int:
    """Elements of a tensor that are in this process."""
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


def retriever() -> SASRec:
    torch.manual_seed(3)
    config = validate(SASRec.Config, {"name": "sasrec", "dim": 8, "dropout": 0.0, "max_length": LENGTH, "init_std": 0.3})
    return SASRec(config, ItemTable(ITEMS, torch.ones(ITEMS, dtype=torch.bool)))


def histories(step: int, world: World) -> SequenceBatch:
    """This process's share of a batch of rows that are equally long."""
    items = torch.randint(ITEMS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    own, lacking = world.share(ROWS)
    assert not lacking, "so that all have as many targets"
    mine = items[own.start : own.stop]
    rows = len(mine)
    return SequenceBatch(
        items=mine[:, :-1].flatten(),
        offsets=torch.arange(rows + 1) * (LENGTH - 1),
        targets=mine[:, 1:].flatten(),
        target_row=torch.arange(rows).repeat_interleave(LENGTH - 1),
        target_position=torch.arange(1, LENGTH).repeat(rows),
    )


def main(folder: Path, kind: str, dense: str) -> None:
    world = join()
    model: nn.Module = retriever() if kind == "retriever" else worker.model()
    total = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if not name.startswith("tables.")}
    together = Together(model, DenseOptimizer(learning_rate=0.01), folder / "run", 1, {}, validate(Distribution, {"dense": dense}))
    table = TableLoader(worker.data(ROWS * STEPS), worker.to_batch, batch_size=ROWS, shuffle=False, world=world)
    batches = [histories(step, world) for step in range(STEPS)] if kind == "retriever" else table
    own = together.optimizers.dense_parameters
    losses = []
    for batch in batches:
        together.optimizers.begin_step(1.0)
        loss, _ = together.loss(batch)
        values, _ = together.settle({"loss": float(loss.detach())}, [])
        losses.append(values["loss"])
        loss.backward()
        norm = together.optimizers.gradient_norm()
        together.optimizers.clip(CLIP, norm)
        gradients = [parameter.grad for parameter in own.values() if parameter.grad is not None]
        together.optimizers.step()
    said = {
        "shapes": total,
        "parameters": sum(map(held, own.values())),
        "gradients": sum(map(held, gradients)),
        "state": sum(held(value) for state in together.optimizers.dense_state().values() for value in state.values() if value.ndim),
        "losses": losses,
        "norm": norm,
        "clipped": together.optimizers.gradient_norm(),
    }
    (folder / f"said-{world.rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:4])
