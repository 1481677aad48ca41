# SPDX-License-Identifier: Apache-2.0
"""Attention to chosen keys as the torch.library op ``recsys::selected_attention``, with a fake implementation and its own gradient."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import backend
from kernels.library import define
from kernels.op import KernelSpec, Op, Shape, Work
from kernels.selected_attention import cpu, reference
from kernels.selected_attention.shape import Case

SHAPES: tuple[Shape, ...] = (
    Case(1, 1, 1, 1, 1, 1, 1, 1, 3, 3, 0),
    Case(1, 4, 2, 7, 20, 2, 3, 6, 5, 3, 1),
    Case(1, 4, 2, 5, 63, 4, 2, 9, 16, 16, 1),
    Case(1, 3, 1, 1, 300, 1, 1, 270, 33, 33, 0),
    Case(2, 1, 1, 100, 50, 1, 1, 20, 8, 8, 0),
    Case(1, 2, 1, 63, 130, 1, 2, 100, 12, 40, 1),
    Case(1, 3, 3, 2, 9, 3, 2, 9, 64, 64, 0),
    Case(0, 2, 1, 3, 9, 1, 1, 4, 4, 4, 1),
    Case(2, 2, 1, 3, 9, 1, 3, 0, 4, 5, 0),
)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    valid: Tensor,
    last: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of blocks of queries to the keys that were chosen for each; see `kernels.selected_attention.reference`.

    The choice is a constant. A query that reads nothing gives zeros and takes no part in a gradient. Keys and values may lie in memory
    anyhow as long as the last axis is together: a cache ``[B, N, H_kv, e]`` seen as ``[B, H_kv, N, e]`` is not copied.

    Args:
        q: ``[B, H, T, e]``; T queries form Q blocks of ``ceil(T / Q)`` adjacent ones. Under autocast q, k and v take its dtype.
        k: ``[B, H_kv, N, e]``, H_kv a divisor of H.
        v: ``[B, H_kv, N, e_v]``.
        index: int32 or int64 ``[B, G, Q, K]``, G of 1, H_kv or H. Places from 0 to N - 1 where valid: looked through on the CPU; on a GPU,
            which would have to wait for it, other places are read as not valid.
        valid: bool ``[B, G, Q, K]``.
        last: int32 or int64 ``[T]``, the last place that each query reads; None for no bound.
        scale: of the inner products; 1 / √e if None.

    Returns:
        ``[B, H, T, e_v]``.

    Raises:
        ValueError: names the argument that does not fit the others, and what was expected.
        RuntimeError: on the CPU, a valid entry of ``index`` names no key.
    """
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    _check_keys(q, k, v)
    _check_choice(q, k, index, valid, last)
    last = None if last is None else last.contiguous()
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    y, _ = _forward(q, k, v, index.contiguous(), valid.contiguous(), last, scale)
    return cast(Tensor, y)


def _check_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or q.shape[3] == 0:
        raise ValueError(f"q: expected [B, H, T, e] with e at least 1, got {tuple(q.shape)}")
    batch, heads, _, width = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[3]) != (batch, width) or not k.shape[1] or heads % k.shape[1] or k.dtype != q.dtype:
        wanted = f"{q.dtype} of shape [{batch}, a divisor of {heads}, N, {width}]"
        raise ValueError(f"k: expected {wanted}, got {k.dtype} of shape {tuple(k.shape)}")
    if v.dim() != 4 or v.shape[:3] != k.shape[:3] or not v.shape[3] or v.dtype != q.dtype:
        wanted = f"{q.dtype} of shape [{batch}, {k.shape[1]}, {k.shape[2]}, e_v]"
        raise ValueError(f"v: expected {wanted}, got {v.dtype} of shape {tuple(v.shape)}")


def _check_choice(q: Tensor, k: Tensor, index: Tensor, valid: Tensor, last: Tensor | None) -> None:
    (batch, heads, length, _), key_heads, whole = q.shape, k.shape[1], (torch.int32, torch.int64)
    if index.dim() != 4 or index.shape[0] != batch or index.shape[1] not in (1, key_heads, heads) or index.dtype not in whole:
        wanted = f"int32 or int64 of shape [{batch}, 1, {key_heads} or {heads}, Q, K]"
        raise ValueError(f"index: expected {wanted}, got {index.dtype} of shape {tuple(index.shape)}")
    blocks = index.shape[2]
    if not 1 <= blocks <= length or -(-length // -(-length // blocks)) != blocks:
        raise ValueError(f"index: expected blocks of equal size for {length} queries, but the last, got {blocks} blocks")
    if valid.shape != index.shape or valid.dtype != torch.bool:
        raise ValueError(f"valid: expected bool of shape {tuple(index.shape)}, as index, got {valid.dtype} of shape {tuple(valid.shape)}")
    if last is not None and (last.shape != (length,) or last.dtype not in whole):
        raise ValueError(f"last: expected int32 or int64 of shape ({length},), got {last.dtype} of shape {tuple(last.shape)}")


@define("recsys::selected_attention")
def _forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, last: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    module = backend.implementation("selected_attention", q, v)
    with torch.autocast(q.device.type, enabled=False):
        y, lse = (module or cpu).forward(q, k, v, index, valid, last, scale)
        if module is None and k.shape[2]:
            y = reference.selected_attention(q, k, v, index, valid, last, scale).contiguous()
    return y, lse


@define("recsys::selected_attention_backward")
def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, last: Tensor | None, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    module = backend.implementation("selected_attention", q, v) or cpu
    with torch.autocast(q.device.type, enabled=False):
        return cast(tuple[Tensor, Tensor, Tensor], module.backward(dy, q, k, v, index, valid, last, y, lse, scale))


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, last: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


@_backward.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, last: Tensor | None, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale  # type: ignore[attr-defined]


def _gradient(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
    tensors, scale = ctx.saved_tensors, ctx.scale  # type: ignore[attr-defined]
    dq, dk, dv = _backward(dy, *tensors, scale)
    return dq, dk, dv, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_save)


def gathered_elements(q: Sequence[int], k: Sequence[int], v: Sequence[int], index: Sequence[int]) -> int:
    """Of the rows of keys and values that one pass, forward or backward, reads by index, given the shapes of its inputs."""
    rows = k[0] * max(index[1], k[1]) * index[2] * index[3]
    return rows * (k[3] + v[3])


def _pairs(q: Sequence[int], index: Sequence[int]) -> int:
    """Of queries and listed keys; a last block that is not full counts as full, since its queries are computed."""
    return q[0] * q[1] * index[2] * -(-q[2] // index[2]) * index[3]


@register_flop_formula(torch.ops.recsys.selected_attention)
def _forward_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], index: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * _pairs(q, index) * (q[3] + v[3])


@register_flop_formula(torch.ops.recsys.selected_attention_backward)
def _backward_flops(dy: Any, q: Sequence[int], k: Sequence[int], v: Sequence[int], index: Sequence[int], *_: Any, **__: Any) -> int:
    """Five products: the scores again, and the gradients of values, weights, queries and keys."""
    return 2 * _pairs(q, index) * (3 * q[3] + 2 * v[3])


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    """No key twice, in no order; a tenth of the entries does not count, and of several blocks the first one has none that does."""
    case = Case(*shape)

    def drawn(heads: int, places: int, width: int) -> Tensor:
        return torch.randn(case.batch, heads, places, width, generator=generator).to(dtype).requires_grad_()

    q = drawn(case.heads, case.queries, case.width)
    k, v = (drawn(case.key_heads, case.keys, width) for width in (case.width, case.value_width))
    ranks = torch.rand(case.batch, case.groups, case.blocks, case.keys, generator=generator)
    index = ranks.topk(case.kept).indices.int()
    valid = torch.rand(index.shape, generator=generator) < 0.9
    if case.blocks > 1:
        valid[:1, :1, 0] = False
    last = (torch.arange(case.queries) + 1) * case.keys // case.queries - 1 if case.causal else None
    return q, k, v, index, valid, last, 1 / math.sqrt(case.width)


def _specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    from kernels.selected_attention import triton_ops

    return triton_ops.specs(shapes)


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """Forward: q, the choice and the chosen rows in, y out; two products. Backward: these, y and dy in, three gradients out; five.

    A row that several blocks choose is read once: at least as many rows as one block lists, at most all.
    """
    case = Case(*shape)
    heads = case.batch * case.heads
    queries, values = heads * case.queries * case.width, heads * case.queries * case.value_width
    rows = case.batch * case.key_heads * (case.width + case.value_width)
    choice = case.batch * case.groups * case.blocks * case.kept * 5
    last = 8 * case.queries * case.causal
    statistics = 4 * heads * case.queries
    pairs = heads * case.queries * case.kept
    chosen = rows * min(case.keys, case.kept * (case.blocks if case.causal else 1))
    return Work(
        flops=pairs * (8 * case.width + 6 * case.value_width),
        read=(2 * queries + 2 * values + 2 * chosen) * dtype.itemsize + 2 * (choice + last) + statistics,
        written=(queries + values + rows * case.keys) * dtype.itemsize + statistics,
    )


OP = Op(
    "selected_attention",
    selected_attention,
    reference.selected_attention,
    _inputs,
    SHAPES,
    small=Case(2, 4, 2, 3, 6, 2, 2, 4, 2, 3, 1),
    work=_work,
    specs=_specs,
)
