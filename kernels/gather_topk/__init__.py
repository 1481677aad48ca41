# SPDX-License-Identifier: Apache-2.0
"""Catalogue gather-and-sum with a running top-k, so that the scores of a whole catalogue never exist in memory.

`gather_topk` is the native search of the host, from numpy to numpy; `best_items` is the same as the torch.library op
``recsys::gather_topk``, with a fake implementation and without a gradient, on any device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from kernels import backend
from kernels.gather_topk import native, reference
from kernels.library import define
from kernels.op import KernelSpec, Op, Shape, Work

MOST_ITEMS = 1 << 32  # what half a key can number

# Users, slots, codes of a slot, items, k. All of a list is found: the comparison takes no infinity, so that short lists are left to tests
# of their own.
SHAPES: tuple[Shape, ...] = (
    (1, 1, 1, 1, 1),
    (2, 4, 5, 63, 7),
    (1, 3, 100, 100, 20),
    (1, 2, 7, 300, 5),
    (2, 1, 9, 33, 1),
    (0, 2, 3, 4, 2),
)


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
        RuntimeError: there is no native search on this machine, see `kernels.gather_topk.native.available`.
    """
    if not native.available():
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
    return native.search(weights_vb, bags.rows, k, chosen, np.ascontiguousarray(offsets, np.int64), np.ascontiguousarray(dropped, np.int64))


def _check(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.ndim != 2 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"{name}: expected contiguous {dtype} of two dimensions on the CPU, got {tensor.dtype} {list(tensor.shape)}")


def best_items(
    values: Tensor, codes: Tensor, rows: Tensor | None, excluded_offsets: Tensor | None, excluded: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """The k best items of each user, by the sum of the user's numbers of each item's codes: score descending, then row ascending.

    Args:
        values: floating ``[B, K, V]``: the users' numbers of each code of each slot.
        codes: int32 or int64 ``[N, K]``, 0 to V - 1; at most 2^32 items. They are checked on the CPU, as rows are, and not on a GPU,
            which would have to wait.
        rows: int64 ``[M]``, ascending: the items that may come back; None for all.
        excluded_offsets: int64 ``[B + 1]``: user b may not get ``excluded[offsets[b] : offsets[b + 1]]``; None for no such items.
        excluded: int64, ascending within each user.
        k: of a list, at least 1. Beyond 1,024 a GPU scores the whole catalogue in plain torch.

    Returns:
        int64 ``[B, k]`` rows and their scores in the dtype of the values, summed and compared in float32 (float64 for float64); -1 and
        -inf where there are no more items above -inf. NaN is no score.

    Raises:
        ValueError: an argument has another dtype or shape.
        RuntimeError: on the CPU, a code or a row is not there.
    """
    _hold("values", values, values.is_floating_point() and values.ndim == 3, "floating-point [B, K, V]")
    whole = codes.dtype in (torch.int32, torch.int64) and codes.ndim == 2 and len(codes) <= MOST_ITEMS
    _hold("codes", codes, whole and codes.shape[1] == values.shape[1], f"int32 or int64 [N, {values.shape[1]}], as there are slots")
    if rows is not None:
        _hold("rows", rows, rows.dtype == torch.int64 and rows.ndim == 1, "torch.int64 of one axis")
    if (excluded is None) != (excluded_offsets is None):
        raise ValueError("excluded, excluded_offsets: expected both or neither")
    if excluded is not None and excluded_offsets is not None:
        wanted = (values.shape[0] + 1,)
        per_user = excluded_offsets.dtype == torch.int64 and tuple(excluded_offsets.shape) == wanted
        _hold("excluded_offsets", excluded_offsets, per_user, f"torch.int64 {wanted}")
        _hold("excluded", excluded, excluded.dtype == torch.int64 and excluded.ndim == 1, "torch.int64 of one axis")
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    found, scores = _forward(values, codes, rows, excluded_offsets, excluded, k)
    return found, scores


def _hold(name: str, tensor: Tensor, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {tensor.dtype} of shape {tuple(tensor.shape)}")


@define("recsys::gather_topk")
def _forward(
    values: Tensor, codes: Tensor, rows: Tensor | None, excluded_offsets: Tensor | None, excluded: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    module = backend.implementation("gather_topk", values, k)
    call = reference.gather_topk if module is None else module.forward
    return cast(tuple[Tensor, Tensor], call(values, codes, rows, excluded_offsets, excluded, k))


@_forward.register_fake
def _(
    values: Tensor, codes: Tensor, rows: Tensor | None, excluded_offsets: Tensor | None, excluded: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    return codes.new_empty(values.shape[0], k, dtype=torch.int64), values.new_empty(values.shape[0], k)


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor | int, ...]:
    """Quarters, exact in every dtype, so that ties are many; the first k rows may come back and are not excluded."""
    users, slots, codes, items, k = shape
    values = torch.randint(-32, 1, (users, slots, codes), generator=generator).div(4).to(dtype)
    table = torch.randint(0, codes, (items, slots), generator=generator, dtype=torch.int32)
    chosen, dropped = torch.rand(items, generator=generator) < 0.8, torch.rand(users, items, generator=generator) < 0.1
    chosen[:k], dropped[:, :k] = True, False
    user, excluded = dropped.nonzero(as_tuple=True)
    return values, table, chosen.nonzero()[:, 0], torch.searchsorted(user, torch.arange(users + 1)), excluded, k


def _specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    from kernels.gather_topk import triton_ops

    return triton_ops.specs(shapes)


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """A sum for each code of each item and user; values and codes in once, lists out."""
    users, slots, codes, items, k = shape
    read = users * slots * codes * dtype.itemsize + 4 * items * slots
    return Work(flops=users * items * slots, read=read, written=users * k * (8 + dtype.itemsize))


OP = Op("gather_topk", best_items, reference.gather_topk, _inputs, SHAPES, small=None, work=_work, specs=_specs)
