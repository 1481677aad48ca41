# SPDX-License-Identifier: Apache-2.0
"""Catalogue gather-and-sum with a running top-k, so that the scores of a whole catalogue never exist in memory."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.gather_topk import cpu


def native() -> bool:
    """Whether `gather_topk` can run here."""
    return cpu.available()


@dataclass(frozen=True)
class Bags:
    """Which rows of the weights each item is made of: looked through once, and searched often.

    Attributes:
        rows: int32 ``[N, K]``, contiguous; fewer than 2^32 items.
        width: V, how many rows the weights have.

    Raises:
        ValueError: an item names a row that the weights do not have, or it is no such tensor.
    """

    rows: Tensor
    width: int

    def __post_init__(self) -> None:
        _check("bags", self.rows, torch.int32)
        if self.rows.numel() and not 0 <= int(self.rows.min()) <= int(self.rows.max()) < self.width:
            raise ValueError(f"bags: expected rows of {self.width} weights, got {int(self.rows.min())} to {int(self.rows.max())}")


def gather_topk(
    weights_vb: Tensor,
    bags: Bags,
    k: int,
    rows: np.ndarray | None = None,
    excluded_offsets: np.ndarray | None = None,
    excluded_rows: np.ndarray | None = None,
) -> np.ndarray:
    """The k best items of each of B users, by the sum of the users' numbers of each item's K codes; on the host.

    Args:
        weights_vb: float32 ``[V, B]``, contiguous: a row for each code of each slot.
        bags: of the N items.
        k: of a list, at least 1.
        rows: int64, ascending: the items that may come back; None for all.
        excluded_offsets: int64 ``[B + 1]``: the items that may not come back for user b are ``excluded_rows[offsets[b]:offsets[b + 1]]``.
        excluded_rows: int64, ascending within each user.

    Returns:
        uint64 ``[B, k]``, largest first: keys in which a better score is larger, then a smaller row (`recsys.retrieval.catalogue.topk`),
        and 0 where there are no more items of a score above -inf.

    Raises:
        ValueError: an argument has another dtype, layout or size.
        RuntimeError: there is no native search on this machine, see `native`.
    """
    if not native():
        raise RuntimeError("gather_topk: expected a C++ compiler on this machine, or RECSYS_NATIVE unset")
    _check("weights", weights_vb, torch.float32)
    if len(weights_vb) != bags.width:
        raise ValueError(f"weights: expected {bags.width} rows, as the bags name, got {len(weights_vb)}")
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    offsets = np.zeros(weights_vb.shape[1] + 1, np.int64) if excluded_offsets is None else excluded_offsets
    dropped = np.zeros(0, np.int64) if excluded_rows is None else excluded_rows
    if len(offsets) != weights_vb.shape[1] + 1 or int(offsets[-1]) != len(dropped):
        raise ValueError(
            f"excluded: expected offsets for {weights_vb.shape[1]} users up to {len(dropped)} rows, got {offsets.tolist()[-3:]}"
        )
    chosen = None if rows is None else np.ascontiguousarray(rows, np.int64)
    if chosen is not None and len(chosen) and not 0 <= int(chosen[0]) <= int(chosen[-1]) < len(bags.rows):
        raise ValueError(f"rows: expected some of {len(bags.rows)} items, ascending, got {int(chosen[0])} to {int(chosen[-1])}")
    return cpu.search(weights_vb, bags.rows, k, chosen, np.ascontiguousarray(offsets, np.int64), np.ascontiguousarray(dropped, np.int64))


def _check(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.ndim != 2 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"{name}: expected contiguous {dtype} of two dimensions on the CPU, got {tensor.dtype} {list(tensor.shape)}")
