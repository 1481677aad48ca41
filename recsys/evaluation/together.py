# SPDX-License-Identifier: Apache-2.0
"""Predictions of a model that several processes hold together, each for its share of the rows."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch.distributed as dist

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
