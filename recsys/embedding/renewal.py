# SPDX-License-Identifier: Apache-2.0
"""New vectors for rows that have gone from one id to another, whether this process holds the whole table or a part of it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.optim.keyed import KeyedOptimizer

from recsys.embedding.buckets import GOLDEN, Gone, mix


def normal(keys_n: Tensor, width: int) -> Tensor:
    """Standard normal float32 ``[N, width]``, each row a function of its key int64 ``[N]`` alone: SplitMix64 and Box and Muller's method.

    So it does not matter which process draws it, or what was drawn before.
    """
    states = keys_n[:, None] + torch.arange(1, 2 * width + 1, device=keys_n.device) * GOLDEN
    bits = (mix(states) >> 11) & ((1 << 53) - 1)
    u, v = ((bits.double() + 0.5) * 2.0**-53).chunk(2, dim=1)
    return ((-2.0 * u.log()).sqrt() * (2.0 * math.pi * v).cos()).float()


@torch.no_grad()
def renew(collections: Iterable[nn.Module], optimizers: Iterable[KeyedOptimizer], gone: Mapping[str, Gone], std: float) -> None:
    """Draw the vectors of rows anew, and forget their accumulators, in what this process holds. TorchRec leaves both as they were.

    Args:
        collections: of tables, sharded or not.
        optimizers: theirs.
        gone: by table.
        std: the deviation of the new vectors.
    """
    weights = [(name, tensor) for collection in collections for name, tensor in collection.state_dict().items()]
    accumulators = [
        (name, tensor) for optimizer in optimizers for name, states in optimizer.state_dict()["state"].items() for tensor in states.values()
    ]
    for kind, named in (("weight", weights), ("accumulator", accumulators)):
        for name, tensor in named:
            if (one := gone.get(name.split(".")[-2])) is None:
                continue
            for first, part in _parts(tensor):
                own = (one.rows >= first) & (one.rows < first + len(part))
                # .data, so that a forward pass whose backward pass is still to come does not object; FBGEMM's own updates do the same.
                new = normal(one.keys[own], part.shape[1]) * std if kind == "weight" else 0.0
                part.data[one.rows[own] - first] = new


def _parts(tensor: Any) -> Iterator[tuple[int, Tensor]]:
    """The ranges of rows that this process holds of a table: where each begins, and its memory."""
    if not hasattr(tensor, "local_shards"):
        yield 0, tensor
        return
    for shard in tensor.local_shards():
        yield shard.metadata.shard_offsets[0], shard.tensor
