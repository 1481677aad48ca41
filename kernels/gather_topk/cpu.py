# SPDX-License-Identifier: Apache-2.0
"""The native search, through ctypes; and the op's lists by it, or by PyTorch's bag where there is no compiler."""

import ctypes
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels import native
from kernels.gather_topk import reference

_LAST_ROW = (1 << 32) - 1
_SIGN = -(1 << 63)  # with it turned, keys are ordered as signed numbers; it stands for no item
_TILE = 16384  # items that PyTorch's bag scores at once
LANES = 16  # users whose numbers lie in one register
_SOURCE = Path(__file__).with_name("cpu.cpp")


def available() -> bool:
    """Whether there is a native search on this machine; compiles it where it has not been."""
    return native.load(_SOURCE) is not None


def search(
    weights_vb: Tensor, bags_nk: Tensor, k: int, rows: np.ndarray | None, excluded_offsets: np.ndarray, excluded_rows: np.ndarray
) -> np.ndarray:
    """See `kernels.gather_topk.gather_topk`; only where `available`."""
    library, users = native.load(_SOURCE), weights_vb.shape[1]
    assert library is not None
    weights = functional.pad(weights_vb, (0, -users % LANES)).unflatten(1, (-1, LANES)).transpose(0, 1).contiguous()  # [groups, V, LANES]
    out = np.zeros((users, k), np.uint64)
    if users and k:
        library.gather_topk(
            ctypes.c_void_p(weights.data_ptr()),
            ctypes.c_int64(weights.shape[1]),
            ctypes.c_int64(weights.shape[0]),
            ctypes.c_int64(users),
            ctypes.c_void_p(bags_nk.data_ptr()),
            ctypes.c_int64(bags_nk.shape[1]),
            None if rows is None else ctypes.c_void_p(rows.ctypes.data),
            ctypes.c_int64(len(bags_nk) if rows is None else len(rows)),
            ctypes.c_void_p(excluded_offsets.ctypes.data) if len(excluded_rows) else None,
            ctypes.c_void_p(excluded_rows.ctypes.data) if len(excluded_rows) else None,
            ctypes.c_int64(k),
            ctypes.c_int64(torch.get_num_threads()),
            ctypes.c_void_p(out.ctypes.data),
        )
    return out


def forward(
    values_bkv: Tensor, codes_nk: Tensor, rows: Tensor | None, excluded_offsets: Tensor | None, excluded: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """See `kernels.gather_topk.best_items`. Float64, and items without codes, take the reference.

    Raises:
        RuntimeError: a code is beyond the slots' numbers, or a row beyond the items.
    """
    check(values_bkv, codes_nk, rows, excluded)
    if values_bkv.dtype == torch.float64 or not values_bkv.shape[1]:
        return reference.gather_topk(values_bkv, codes_nk, rows, excluded_offsets, excluded, k)
    users, slots, codes = values_bkv.shape
    weights = values_bkv.float().flatten(1).T.contiguous()
    bags = (codes_nk + torch.arange(slots) * codes).to(torch.int32).contiguous()
    offsets = torch.zeros(users + 1, dtype=torch.int64) if excluded_offsets is None else excluded_offsets.contiguous()
    dropped = torch.zeros(0, dtype=torch.int64) if excluded is None else excluded.contiguous()
    if available():
        chosen = None if rows is None else rows.contiguous().numpy()
        keys = search(weights, bags, k, chosen, offsets.numpy(), dropped.numpy())
        found = torch.from_numpy(keys.view(np.int64)) ^ _SIGN
    else:
        found = bagged(weights, bags, k, rows, offsets, dropped)
    none = found == _SIGN
    bits = (found >> 32).to(torch.int32)
    scores = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32).masked_fill(none, -torch.inf)
    return (_LAST_ROW - (found & _LAST_ROW)).masked_fill(none, -1), scores.to(values_bkv.dtype)


def bagged(weights_vb: Tensor, bags_nk: Tensor, k: int, rows: Tensor | None, offsets: Tensor, excluded: Tensor) -> Tensor:
    """int64 ``[B, k]``: the keys of `search` with the sign turned, best first; scored in tiles by PyTorch's bag."""
    users, numbers = weights_vb.shape[1], torch.arange(len(bags_nk)) if rows is None else rows
    owner = torch.arange(users).repeat_interleave(offsets.diff(), output_size=len(excluded))
    best = torch.full((users, k), _SIGN)
    for part in numbers.split(_TILE) if len(numbers) else ():
        scores = functional.embedding_bag(bags_nk[part], weights_vb, mode="sum").T
        bits = scores.add(0.0).view(torch.int32)  # -0.0 becomes 0.0
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
        keys = ((ordered << 32) | (_LAST_ROW - part)).masked_fill_(~(scores > -torch.inf), _SIGN)
        place = torch.searchsorted(part, excluded).clamp_(max=len(part) - 1)
        inside = part[place] == excluded
        keys[owner[inside], place[inside]] = _SIGN
        best = torch.cat((best, keys), 1).topk(k).values
    return best


def check(values_bkv: Tensor, codes_nk: Tensor, rows: Tensor | None, excluded: Tensor | None) -> None:
    """Look through codes and rows.

    Raises:
        RuntimeError: a code is beyond the slots' numbers, or a row beyond the items.
    """
    items = len(codes_nk)
    for name, given, size in (("codes", codes_nk, values_bkv.shape[2]), ("rows", rows, items), ("excluded", excluded, items)):
        if given is not None and given.numel() and not 0 <= int(given.min()) <= int(given.max()) < size:
            raise RuntimeError(f"{name}: expected 0 to {size - 1}, got {int(given.min())} to {int(given.max())}")
