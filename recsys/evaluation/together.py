# SPDX-License-Identifier: Apache-2.0
"""What a model that several processes hold together says of rows and of steps, each process of its share of them."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch.distributed as dist

from recsys.data.sequences import EvaluationSteps
from recsys.data.world import World

Batch = TypeVar("Batch")


def predictions(predict: Callable[[Batch], np.ndarray], batches: Iterable[Batch], rows: int, batch_size: int) -> np.ndarray:
    """One prediction for each row, in the order of the rows, in every process. A collective call.

    Args:
        predict: from a batch to an array whose first axis is its rows.
        batches: of a loader that does not shuffle and gives each process its share (``world=World.current()``).
        rows: how many there are in all.
        batch_size: rows of a batch of all processes.
    """
    world = World.current()
    parts = []
    for number, batch in enumerate(batches):
        own, _ = world.share(min(batch_size, rows - number * batch_size))
        parts.append(predict(batch)[: len(own)])
    if world.size == 1:
        return np.concatenate(parts)
    everywhere: list[list[np.ndarray]] = [[] for _ in range(world.size)]
    dist.all_gather_object(everywhere, parts)
    return np.concatenate([own[number] for number in range(len(parts)) for own in everywhere])


def shared_ranks(ranks: Callable[[EvaluationSteps], np.ndarray], steps: EvaluationSteps) -> np.ndarray:
    """The rank of every target of the steps, in their order, in every process; each ranks those of a range of the steps. A collective call.

    Args:
        ranks: of the targets of some steps, float64, such as `recsys.evaluation.retrieval.model_ranks` gives.
        steps: of all processes.
    """
    world = World.current()
    if world.size == 1:
        return ranks(steps)
    own, _ = world.share(len(steps))
    everywhere = [np.zeros(0) for _ in range(world.size)]
    dist.all_gather_object(everywhere, ranks(steps.take(np.arange(own.start, own.stop))))
    return np.concatenate(everywhere)
