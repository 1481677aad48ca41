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


def pooled(x: Tensor) -> Tensor:
    """The mean of ``x`` over all processes, with the gradient of this one's part: for a penalty that is not linear in it.

    The mean over the processes of the gradients of ``f(pooled(x))`` is then the gradient of f of the mean. Every process makes the call.
    """
    return x + (average(x) - x).detach()


def shared_count(count: int, like: Tensor) -> Tensor:
    """What a loss divides its sum over ``count`` by: the mean count of all processes, a scalar on the device of ``like``; 1 for none.

    A float32, or a float64 where ``like`` is one. Every process makes the call.
    """
    total = average(torch.tensor(float(count), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device))
    return total.where(total > 0, 1.0)


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
