# SPDX-License-Identifier: Apache-2.0
"""Ids go to the processes that own them, and their rows come back: the collectives of managed ids in sharded tables.

All of it runs over torch's default group, and every process makes every call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from recsys.data.world import World
from recsys.embedding.buckets import Gone


@dataclass(frozen=True)
class Asked:
    """Ids of one table whose rows are wanted.

    Attributes:
        ids: int64 ``[N]``, without "no value".
        counts: bool ``[N]``, whether the sighting counts; all of them where it is None.
    """

    ids: Tensor
    counts: Tensor | None = None


Answer = Callable[[Sequence[Asked]], tuple[list[Tensor], list[Gone | None]]]
"""Rows of what is asked of each table, int64 ``[N]``, and those that have gone from one id to another."""


def exchange(world: World, asked: Sequence[Asked], owners: Sequence[Tensor], answer: Answer) -> tuple[list[Tensor], list[Gone | None]]:
    """`Answer` of all processes together: each answers for the ids that it owns, those of the first process before those of the second.

    Three collectives of all tables together, and a fourth where a row has gone.

    Args:
        world: the processes.
        asked: by table.
        owners: by table int64 ``[N]``, the process that owns each id.
        answer: of this process.

    Returns:
        The rows of what this process asked, and what has gone in any of them.
    """
    tables = len(asked)
    # A cell is (process, table, whether it counts): ids are sent in the order of cells, and their numbers tell the rest.
    cells_n = torch.cat([_cells(table, tables, one, owner) for table, (one, owner) in enumerate(zip(asked, owners, strict=True))])
    order_n = cells_n.argsort(stable=True)
    sent = torch.bincount(cells_n, minlength=world.size * tables * 2).view(world.size, -1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    out, back = sent.sum(1).tolist(), received.sum(1).tolist()
    ids_m = _to_all(torch.cat([one.ids for one in asked])[order_n], out, back)
    rows_m, gone = _answered(ids_m, received, tables, answer)

    # With the rows comes the number of those that have gone, so that nobody waits for what is seldom there.
    told = _told(gone, ids_m.device)
    head = torch.tensor([len(told)], device=ids_m.device)
    answers = torch.cat([part for rows in rows_m.split(back) for part in (head, rows)])
    parts = _to_all(answers, [n + 1 for n in back], [n + 1 for n in out]).split([n + 1 for n in out])
    rows_n = torch.empty_like(cells_n)
    rows_n[order_n] = torch.cat([part[1:] for part in parts])
    went = _everywhere(told, torch.stack([part[0] for part in parts]).tolist())
    return list(rows_n.split([len(one.ids) for one in asked])), [_of_table(went, table) for table in range(tables)]


def _cells(table: int, tables: int, asked: Asked, owner_n: Tensor) -> Tensor:
    silent_n = 0 if asked.counts is None else (~asked.counts).long()
    return (owner_n * tables + table) * 2 + silent_n


def _to_all(values: Tensor, out: list[int], back: list[int]) -> Tensor:
    """Send the first ``out[0]`` values to process 0 and so on; what comes from process 0 is first."""
    got = values.new_empty(sum(back))
    dist.all_to_all_single(got, values, back, out)
    return got


def _answered(ids_m: Tensor, received: Tensor, tables: int, answer: Answer) -> tuple[Tensor, list[Gone | None]]:
    """The rows of ids that came from all processes, in their order."""
    numbers = torch.arange(received.numel(), device=ids_m.device)
    cells_m = numbers.repeat_interleave(received.flatten())
    places = [(cells_m // 2 % tables == table).nonzero()[:, 0] for table in range(tables)]
    rows, gone = answer([Asked(ids_m[place], cells_m[place] % 2 == 0) for place in places])
    rows_m = torch.empty_like(ids_m)
    rows_m[torch.cat(places)] = torch.cat(rows)
    return rows_m, gone


def _told(gone: Sequence[Gone | None], device: torch.device) -> Tensor:
    """int64 ``[E, 3]``: table, row and key."""
    lines = [torch.stack([torch.full_like(g.rows, table), g.rows, g.keys], 1) for table, g in enumerate(gone) if g is not None]
    return torch.cat(lines) if lines else torch.empty(0, 3, dtype=torch.int64, device=device)


def _everywhere(told: Tensor, sizes: list[int]) -> Tensor:
    """What every process tells; each knows how much the others have to tell."""
    if not any(sizes):
        return told
    padded = torch.cat([told, told.new_zeros(max(sizes) - len(told), told.shape[1])])
    heard = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(heard, padded)
    return torch.cat([one[:size] for one, size in zip(heard, sizes, strict=True)])


def _of_table(went: Tensor, table: int) -> Gone | None:
    own = went[went[:, 0] == table]
    return Gone(own[:, 1], own[:, 2]) if len(own) else None


def gathered(own: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Named tensors of every process, copied to all of them. No name is in two processes."""
    index: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(index, [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()])
    found: dict[str, Tensor] = {}
    for rank, entries in enumerate(index):
        for name, shape, dtype in entries:
            tensor = own[name].detach().to(device, copy=True) if name in own else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(tensor, src=rank)
            found[name] = tensor
    return found
