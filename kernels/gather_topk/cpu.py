# SPDX-License-Identifier: Apache-2.0
"""The lists of the best items by PyTorch's bag: tiles of items are scored, and merged into what was best before."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kernels.gather_topk import reference

_LAST_ROW = (1 << 32) - 1
SIGN = -(1 << 63)  # with it turned, keys are ordered as signed numbers; it stands for no item
_TILE = 16384  # items that are scored at once


def forward(
    values_bkv: Tensor, codes_nk: Tensor, rows: Tensor | None, excluded_offsets: Tensor | None, excluded: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """See `kernels.gather_topk.best_items`. Float64, and items without codes, take the reference.

    Raises:
        RuntimeError: on the CPU, a code is beyond the slots' numbers, or a row beyond the items.
    """
    if values_bkv.dtype == torch.float64 or not values_bkv.shape[1]:
        check(values_bkv, codes_nk, rows, excluded)
        return reference.gather_topk(values_bkv, codes_nk, rows, excluded_offsets, excluded, k)
    given = prepared(values_bkv, codes_nk, rows, excluded_offsets, excluded)
    return lists_of(bagged(given.weights, given.bags, k, rows, given.offsets, given.excluded), values_bkv.dtype)


class Prepared(NamedTuple):
    """What is searched: float32 ``weights [K V, B]``, int32 ``bags [N, K]`` of their rows, and what each user may not get."""

    weights: Tensor
    bags: Tensor
    offsets: Tensor
    excluded: Tensor


def prepared(
    values_bkv: Tensor, codes_nk: Tensor, rows: Tensor | None, excluded_offsets: Tensor | None, excluded: Tensor | None
) -> Prepared:
    """The arguments of the op as both searches take them.

    Raises:
        RuntimeError: on the CPU, a code is beyond the slots' numbers, or a row beyond the items.
    """
    check(values_bkv, codes_nk, rows, excluded)
    users, slots, codes = values_bkv.shape
    device = values_bkv.device
    bags = (codes_nk + torch.arange(slots, device=device) * codes).to(torch.int32).contiguous()
    offsets = torch.zeros(users + 1, dtype=torch.int64, device=device) if excluded_offsets is None else excluded_offsets.contiguous()
    dropped = torch.zeros(0, dtype=torch.int64, device=device) if excluded is None else excluded.contiguous()
    return Prepared(values_bkv.float().flatten(1).T.contiguous(), bags, offsets, dropped)


def lists_of(keys_bk: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows and scores of keys with the sign turned."""
    none = keys_bk == SIGN
    bits = (keys_bk >> 32).to(torch.int32)
    scores = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32).masked_fill(none, -torch.inf)
    return (_LAST_ROW - (keys_bk & _LAST_ROW)).masked_fill(none, -1), scores.to(dtype)


def bagged(weights_vb: Tensor, bags_nk: Tensor, k: int, rows: Tensor | None, offsets: Tensor, excluded: Tensor) -> Tensor:
    """int64 ``[B, k]``: keys with the sign turned, best first: a better score is a larger key, then a smaller row."""
    users, device = weights_vb.shape[1], weights_vb.device
    numbers = torch.arange(len(bags_nk), device=device) if rows is None else rows
    owner = torch.arange(users, device=device).repeat_interleave(offsets.diff(), output_size=len(excluded))
    best = torch.full((users, k), SIGN, device=device)
    for part in numbers.split(_TILE) if len(numbers) else ():
        scores = functional.embedding_bag(bags_nk[part], weights_vb, mode="sum").T
        bits = scores.add(0.0).view(torch.int32)  # -0.0 becomes 0.0
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
        keys = ((ordered << 32) | (_LAST_ROW - part)).masked_fill_(~(scores > -torch.inf), SIGN)
        place = torch.searchsorted(part, excluded).clamp_(max=len(part) - 1)
        inside = part[place] == excluded
        keys[owner[inside], place[inside]] = SIGN
        best = torch.cat((best, keys), 1).topk(k).values
    return best


def check(values_bkv: Tensor, codes_nk: Tensor, rows: Tensor | None, excluded: Tensor | None) -> None:
    """Look through codes and rows on the CPU; a GPU would have to wait.

    Raises:
        RuntimeError: a code is beyond the slots' numbers, or a row beyond the items.
    """
    if values_bkv.device.type != "cpu":
        return
    items = len(codes_nk)
    for name, given, size in (("codes", codes_nk, values_bkv.shape[2]), ("rows", rows, items), ("excluded", excluded, items)):
        if given is not None and given.numel() and not 0 <= int(given.min()) <= int(given.max()) < size:
            raise RuntimeError(f"{name}: expected 0 to {size - 1}, got {int(given.min())} to {int(given.max())}")
