# SPDX-License-Identifier: Apache-2.0
"""The processes that train one model together: which of them this is, its share of a batch, and numbers that belong to all."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """A group of processes.

    Attributes:
        rank: the number of this one.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Self:
        """That of torch's default process group; one process where there is none."""
        return cls(dist.get_rank(), dist.get_world_size()) if _grouped() else cls()

    def share(self, rows: int) -> tuple[range, int]:
        """Which rows of a batch of all processes are this one's, and how many it lacks: TorchRec wants as many rows in each."""
        each = -(-rows // self.size)
        first, last = min(self.rank * each, rows), min((self.rank + 1) * each, rows)
        return range(first, last), each - (last - first)


def average(x: Tensor) -> Tensor:
    """The mean of ``x`` over all processes, without a gradient; ``x`` itself where there is one process.

    A loss that divides its sum by ``average(count)`` in each process is, as the mean over the processes, the sum of all over the count of
    all: what one process with the whole batch would have. Every process must make the call. Nothing is exchanged while gradients are off,
    since processes measure what they like.
    """
    if not _grouped() or dist.get_world_size() == 1 or not torch.is_grad_enabled():
        return x
    total = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    total = total.clone() if total.data_ptr() == x.data_ptr() else total
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
