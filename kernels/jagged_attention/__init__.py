# SPDX-License-Identifier: Apache-2.0
"""Attention inside jagged rows as the torch.library op ``recsys::jagged_attention``, with a fake implementation and its own gradient."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from kernels import backend
from kernels.jagged_attention import cpu, reference
from kernels.jagged_attention.cpu import Rule
from kernels.jagged_attention.reference import Form, Mask
from kernels.jagged_attention.shape import Case, seen_pairs
from kernels.library import define
from kernels.op import KernelSpec, Op, Shape, Work

SHAPES: tuple[Shape, ...] = (
    Case(1, 1, 1, 3, 1, 0, 1, 0, 0),
    Case(3, 8, 2, 4, 0, 1, 3, 2, 5),
    Case(4, 20, 2, 8, 1, 0, 1, 1, 16),
    Case(5, 63, 1, 16, 0, 2, 4, 0, 0),
    Case(3, 100, 2, 5, 1, 2, 7, 2, 130),
    Case(2, 300, 1, 8, 0, 2, 5, 0, 0),
    Case(2, 200, 1, 33, 0, 1, 70, 1, 40),
    Case(2, 65, 3, 64, 1, 1, 5, 3, 1),
    Case(2, 1000, 1, 2, 0, 0, 1, 0, 0),
)


def jagged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    form: Form = "softmax",
    mask: Mask = "causal",
    group: int = 1,
    divisor: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    """Attention inside rows that lie one after another; see `kernels.jagged_attention.reference`.

    Args:
        q: ``[S, H, e]``; likewise ``k`` and ``v``.
        k: see ``q``.
        v: see ``q``.
        offsets: int64 ``[B + 1]``, ascending from 0 to S. On a GPU they are not read by the host and so not checked.
        bias: ``[H or 1, D]``, the dtype of ``q``, by distance between positions; None for none.
        form: "softmax", or "silu", which is HSTU's.
        mask: "causal", "grouped" (all tokens of the items up to one's own) or "prefix" (the first ``seen`` tokens of the row, and oneself).
        group: tokens of an item of the grouped mask; 1 for the others.
        divisor: N of the SiLU form; 1 for softmax.
        seen: int64 ``[S]``, of the prefix mask: from 0 to how many tokens of the row stand before. On a GPU it is not checked.

    Raises:
        ValueError: names the argument that does not fit the others, and what was expected.
    """
    _check(q, k, v, offsets, bias)
    for name, value, known in (("form", form, Form), ("mask", mask, Mask)):
        if value not in get_args(known):
            raise ValueError(f"{name}: expected one of {', '.join(get_args(known))}, got {value!r}")
    if group < 1 or (mask != "grouped" and group != 1):
        raise ValueError(f"group: expected {'at least 1' if mask == 'grouped' else f'1 for the {mask} mask'}, got {group}")
    if (seen is not None) != (mask == "prefix"):
        raise ValueError(f"seen: expected {'one number for each token' if mask == 'prefix' else 'none'} with the {mask} mask")
    if seen is not None and (seen.shape != q.shape[:1] or seen.dtype != torch.int64):
        raise ValueError(f"seen: expected torch.int64 of shape ({q.shape[0]},), got {seen.dtype} of shape {tuple(seen.shape)}")
    if divisor <= 0 or (form == "softmax" and divisor != 1):
        raise ValueError(f"divisor: expected {'1 for softmax' if form == 'softmax' else 'more than 0'}, got {divisor}")
    bias, seen = (None if x is None else x.contiguous() for x in (bias, seen))
    given = (q.contiguous(), k.contiguous(), v.contiguous(), offsets.contiguous(), bias)
    y, _ = _forward(*given, form, mask, group, float(divisor), seen)
    return cast(Tensor, y)


def _check(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Tensor | None) -> None:
    if q.dim() != 3 or q.shape[2] == 0:
        raise ValueError(f"q: expected [S, H, e] with e at least 1, got {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(f"{name}: expected {q.dtype} of shape {tuple(q.shape)}, as q, got {x.dtype} of shape {tuple(x.shape)}")
    if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype != torch.int64:
        raise ValueError(f"offsets: expected torch.int64 of shape [B + 1], got {offsets.dtype} of shape {tuple(offsets.shape)}")
    if bias is not None and (bias.dim() != 2 or bias.shape[0] not in (1, q.shape[1]) or bias.shape[1] < 1 or bias.dtype != q.dtype):
        wanted = f"{q.dtype} of shape [1 or {q.shape[1]}, D] with D at least 1"
        raise ValueError(f"bias: expected {wanted}, got {bias.dtype} of shape {tuple(bias.shape)}")


def _check_values(offsets: Tensor, seen: Tensor | None, tokens: int) -> None:
    if offsets.device.type != "cpu":
        return
    if not (offsets[0] == 0 and offsets[-1] == tokens and bool((offsets.diff() >= 0).all())):
        raise ValueError(f"offsets: expected to ascend from 0 to {tokens}, the tokens of q, got {offsets.tolist()}")
    if seen is not None:
        before = torch.arange(tokens) - torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=tokens)
        if bool(((seen < 0) | (seen > before)).any()):
            token = int(((seen < 0) | (seen > before)).long().argmax())
            raise ValueError(f"seen: expected 0 to {int(before[token])}, the tokens before it, for token {token}, got {int(seen[token])}")


@define("recsys::jagged_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    form: str,
    mask: str,
    group: int,
    divisor: float,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check_values(offsets, seen, q.shape[0])
    module = backend.implementation("jagged_attention", q)
    y, lse = (module or cpu).forward(q, k, v, offsets, bias, Rule(form, mask, group, divisor, seen))
    return (reference.jagged_attention(q, k, v, offsets, bias, form, mask, group, divisor, seen) if module is None else y), lse


@define("recsys::jagged_attention_backward")
def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
    lse: Tensor,
    form: str,
    mask: str,
    group: int,
    divisor: float,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = backend.implementation("jagged_attention", q) or cpu
    gradients = module.backward(dy.contiguous(), q, k, v, offsets, bias, y, lse, Rule(form, mask, group, divisor, seen))
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], gradients)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    form: str,
    mask: str,
    group: int,
    divisor: float,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]) if form == "softmax" else (0,), dtype=wide)


@_backward.register_fake
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
    lse: Tensor,
    form: str,
    mask: str,
    group: int,
    divisor: float,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias


def _save(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, str, str, int, float, Tensor | None],
    output: tuple[Tensor, Tensor],
) -> None:
    *tensors, form, mask, group, divisor, seen = inputs
    y, lse = output
    ctx.save_for_backward(*tensors, y if form == "softmax" else None, lse, seen)  # type: ignore[arg-type]
    ctx.rule = (form, mask, group, divisor)  # type: ignore[attr-defined]


def _gradient(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seen = ctx.saved_tensors  # type: ignore[attr-defined]
    dq, dk, dv, dbias = _backward(dy, *tensors, *ctx.rule, seen)  # type: ignore[attr-defined]
    return dq, dk, dv, None, dbias if tensors[4] is not None else None, *[None] * 5


_forward.register_autograd(_gradient, setup_context=_save)


def _pairs(q: Tensor, offsets: Tensor, seen: Tensor | None, mask: str, group: int) -> int:
    """How many pairs of tokens see each other; where only shapes are known, of rows of equal length, with prefixes of half of it."""
    rows = max(len(offsets) - 1, 1)
    if offsets.is_meta or isinstance(offsets, FakeTensor):
        return rows * seen_pairs(len(q) // rows, "causal" if mask == "prefix" else mask, group)
    if seen is not None:
        return int(seen.sum()) + len(q)
    return sum(seen_pairs(length, mask, group) for length in offsets.diff().tolist())


@register_flop_formula(torch.ops.recsys.jagged_attention, get_raw=True)
def _forward_flops(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Any, form: str, mask: str, group: int, divisor: float, seen: Any, **_: Any
) -> int:
    """Two products over the pairs that see each other."""
    return 4 * q.shape[1] * q.shape[2] * _pairs(q, offsets, seen, mask, group)


@register_flop_formula(torch.ops.recsys.jagged_attention_backward, get_raw=True)
def _backward_flops(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Any, y: Any, lse: Any, form: str, mask: str, group: int,
    divisor: float, seen: Any, **_: Any,
) -> int:  # fmt: skip
    """Five products, one of which forms the scores again."""
    return 10 * q.shape[1] * q.shape[2] * _pairs(q, offsets, seen, mask, group)


def _inputs(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, str, str, int, float, Tensor | None]:
    case = Case(*shape)
    offsets = torch.tensor([0, *case.lengths]).cumsum(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).requires_grad_()

    q, k, v = (drawn(int(offsets[-1]), case.heads, case.width) for _ in range(3))
    bias = drawn(case.biases, case.distances) if case.distances else None
    divisor = 1.0 if case.form == "softmax" else float(case.longest)
    seen = torch.tensor(list(chain.from_iterable(case.seen))) if case.mask == "prefix" else None
    return q, k, v, offsets, bias, case.form, case.mask, case.group if case.mask == "grouped" else 1, divisor, seen


def _specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    from kernels.jagged_attention import triton_ops

    return triton_ops.specs(shapes)


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """Forward: q, k, v in, y out; two products. Backward: these, y and dy in, three gradients out; five products."""
    case = Case(*shape)
    one = sum(case.lengths) * case.heads * case.width * dtype.itemsize
    statistics = sum(case.lengths) * case.heads * 4 if case.form == "softmax" else 0
    table = case.biases * case.distances * dtype.itemsize
    flops = 14 * case.width * case.heads * case.pairs
    return Work(flops, read=8 * one + statistics + 2 * table, written=4 * one + statistics + table)


OP = Op(
    "jagged_attention",
    jagged_attention,
    reference.jagged_attention,
    _inputs,
    SHAPES,
    small=Case(3, 6, 2, 3, 0, 1, 4, 2, 4),
    work=_work,
    specs=_specs,
)
