# SPDX-License-Identifier: Apache-2.0
"""Paged scores as the torch.library op ``recsys::paged_scores``, with a fake implementation and without a gradient: scores choose keys."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import backend
from kernels.library import define
from kernels.op import KernelSpec, Op, Shape, Work
from kernels.paged_scores import cpu, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Heads, key heads, width, pages, then the slots of each row.
SHAPES: tuple[Shape, ...] = (
    (1, 1, 1, 1, 1),
    (4, 2, 5, 63, 40, 0, 7),
    (2, 2, 100, 20, 20, 3, 1),
    (6, 1, 64, 100, 0, 100),
    (3, 3, 33, 300, 290),
    (4, 4, 16, 9, 0),
    (2, 1, 300, 50, 30, 20),
)


def paged_scores(q: Tensor, pages: Tensor, slots: Tensor, offsets: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inner products of each row's query with the keys that its slots name in a pool; see `kernels.paged_scores.reference`.

    No gradient passes.

    Args:
        q: ``[B, H, e]``.
        pages: ``[P, H_kv, e]``, the dtype of ``q``; H_kv divides H, and key head g serves the query heads ``g H / H_kv`` onwards. It may be
            a view whose last axis is together: it is never copied as a whole.
        slots: int32 or int64 ``[S]``, 0 to P - 1, or -1 for none, which scores -∞. Looked through on the CPU; on a GPU, which would have to
            wait for it, what is beyond the pool scores -∞ too.
        offsets: int32 or int64 ``[B + 1]``, from 0 to S, not descending; looked through as ``slots`` is.
        dtype: of the result: float32, bfloat16, float16 or float64.

    Returns:
        ``[H, S]``, the scores of row b in the columns ``offsets[b]:offsets[b + 1]``; computed in float32 (float64 for float64).

    Raises:
        ValueError: names the argument that does not fit the others, and what was expected.
        RuntimeError: on the CPU, a slot is beyond the pool, or the offsets do not divide the slots into rows.
    """
    if q.dim() != 3 or not q.shape[1] or not q.shape[2]:
        raise ValueError(f"q: expected [B, H, e] with a head and a column, got {tuple(q.shape)}")
    rows, heads, width = q.shape
    if pages.dim() != 3 or pages.shape[2] != width or not pages.shape[1] or heads % pages.shape[1] or pages.dtype != q.dtype:
        wanted = f"{q.dtype} of shape [P, a divisor of {heads}, {width}]"
        raise ValueError(f"pages: expected {wanted}, got {pages.dtype} of shape {tuple(pages.shape)}")
    for name, given in (("slots", slots), ("offsets", offsets)):
        fits = given.dim() == 1 and (name == "slots" or given.shape[0] == rows + 1)
        if not fits or given.dtype not in (torch.int32, torch.int64):
            wanted = "S" if name == "slots" else f"{rows + 1}"
            raise ValueError(f"{name}: expected int32 or int64 of shape [{wanted}], got {given.dtype} of shape {tuple(given.shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
    offsets = offsets.to(torch.int64).contiguous()
    return cast(Tensor, _forward(q.detach().contiguous(), pages.detach(), slots.contiguous(), offsets, dtype))


@define("recsys::paged_scores")
def _forward(q: Tensor, pages: Tensor, slots: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    module = backend.implementation("paged_scores", q, dtype)
    with torch.autocast(q.device.type, enabled=False):
        if module is not None:
            return cast(Tensor, module.forward(q, pages, slots, offsets, dtype))
        if q.device.type == "cpu":
            cpu.check(pages, slots, offsets.tolist())
        return reference.paged_scores(q, pages, slots, offsets, dtype)


@_forward.register_fake
def _(q: Tensor, pages: Tensor, slots: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape[1], slots.shape[0], dtype=dtype)


def gathered_elements(pages: Sequence[int], slots: Sequence[int]) -> int:
    """Of the rows that are read by their slots, given the shapes of both."""
    return slots[0] * pages[1] * pages[2]


@register_flop_formula(torch.ops.recsys.paged_scores)
def _flops(q: Sequence[int], pages: Sequence[int], slots: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * q[1] * slots[0] * q[2]


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.dtype]:
    """Each row's slots are permuted."""
    heads, key_heads, width, pages, *lengths = shape
    q = torch.randn(len(lengths), heads, width, generator=generator).to(dtype)
    pool = torch.randn(pages, key_heads, width, generator=generator).to(dtype)
    slots = torch.cat([torch.randperm(pages, generator=generator)[:length] for length in lengths])
    return q, pool, slots, torch.tensor([0, *lengths]).cumsum(0), dtype


def _specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    from kernels.paged_scores import triton_ops

    return triton_ops.specs(shapes)


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """Queries, slots, offsets and the keys in, scores out; a product for each query head and slot."""
    heads, key_heads, width, _, *lengths = shape
    rows, slots = len(lengths), sum(lengths)
    read = (rows * heads + slots * key_heads) * width * dtype.itemsize + 8 * (slots + rows + 1)
    return Work(flops=2 * heads * slots * width, read=read, written=4 * heads * slots)


OP = Op("paged_scores", paged_scores, reference.paged_scores, _inputs, SHAPES, small=None, work=_work, specs=_specs)
