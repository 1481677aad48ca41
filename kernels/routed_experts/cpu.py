# SPDX-License-Identifier: Apache-2.0
"""Routed experts on the CPU: rows are sorted within a token, and each group, the rows of one token and expert, is one dense problem.

The inner layer before the activation is kept for the backward pass where the caller wants one, as `kernels.token_swiglu` does on the CPU.
A gate's gradient is ``⟨dy W_outᵀ, act⟩``, so that no expert's output is kept. Sums over a row's experts are taken in float32 at least.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional


def sort_pairs(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The pairs (row, choice) by token and expert, those without an expert last, and where each group of them begins.

    Works on any device, without waiting for it.

    Args:
        chosen: int64 ``[T, B, k]``. What is below 0 or not below ``experts`` is no expert.
        experts: E.

    Returns:
        int64 ``[T * B * k]``, the places in ``chosen``, in their old order within a group; int64 ``[T * E + 1]``, where the groups begin
        and the last one ends.
    """
    groups = chosen.shape[0] * experts
    first = torch.arange(0, groups, max(experts, 1), device=chosen.device)[:, None, None]
    keys = (first + chosen).where((chosen >= 0) & (chosen < experts), groups).flatten().int()  # half the passes of a radix sort
    keys, order = torch.sort(keys, stable=True)
    return order, torch.searchsorted(keys, torch.arange(groups + 1, dtype=torch.int32, device=keys.device))


def check(chosen: Tensor, experts: int) -> None:
    """Look whether all choices are experts.

    Raises:
        ValueError: one is not.
    """
    if chosen.numel() and (largest := int(chosen.max())) >= experts:
        raise ValueError(f"chosen: expected experts below {experts}, got {largest}")


def forward(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    chosen: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    onto: Tensor | None,
    activation: str,
    save: bool,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result ``[T, B, D]``; and for the gradient the inner layer ``[pairs, F]`` (no rows without ``save``), order and offsets.

    With ``scales``, of the columns of both weights, the weights are int8 or float8. A group's are widened when it is its turn.

    Raises:
        ValueError: a choice is not an expert.
    """
    experts, dim, width = weight_in.shape[1:]
    check(chosen, experts)
    order, offsets = sort_pairs(chosen, experts)
    rows, gates_n1, x_nd = order // max(chosen.shape[2], 1), gates.flatten()[order].unsqueeze(1), x.reshape(-1, dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.new_zeros(x.shape, dtype=wide) if onto is None else onto.to(wide, memory_format=torch.contiguous_format, copy=True)
    y_nd = y.view(-1, dim)
    inner = x.new_empty(order.numel() if save else 0, width)
    inner[offsets[-1] :] = 0  # pairs without an expert
    for token, expert, group in _groups(offsets, experts):
        in_group, w_in, w_out = rows[group], weight_in[token, expert], weight_out[token, expert]
        if scales is not None:
            w_in, w_out = w_in.to(x.dtype), w_out.to(x.dtype)
        product = torch.mm(x_nd.index_select(0, in_group), w_in, out=inner[group] if save else None)
        if scales is not None:
            product *= scales[0][token, expert]
        if bias is not None:
            product += bias[token, expert]
        y_md = torch.mm(_activate(product, activation).mul_(gates_n1[group]), w_out)
        if scales is not None:
            y_md *= scales[1][token, expert]
        y_nd.index_add_(0, in_group, y_md.to(wide))
    return y.to(x.dtype), inner, order, offsets


def backward(
    dy: Tensor,
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    inner: Tensor,
    order: Tensor,
    offsets: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight_in``, ``weight_out``, ``gates`` and ``bias``, the last one empty where there is none.

    Args:
        dy: ``[T, B, D]``.
        x: ``[T, B, D]``.
        weight_in: ``[T, E, D, F]``.
        weight_out: ``[T, E, h, D]``.
        gates: ``[T, B, k]``.
        bias: ``[T, E, F]`` or None.
        inner: of `forward`, ``[pairs, F]``, or without rows, which has it formed again.
        order: of `sort_pairs`, ``[pairs]``.
        offsets: of `sort_pairs`, ``[T * E + 1]``.
        activation: "swiglu" or "gelu".
    """
    experts, dim, _ = weight_in.shape[1:]
    rows, gates_n1 = order // max(gates.shape[2], 1), gates.flatten()[order].unsqueeze(1)
    x_nd, dy_nd = x.reshape(-1, dim), dy.reshape(-1, dim)
    dx_nd = x.new_zeros(x_nd.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    dgates = gates.new_zeros(gates.numel())
    dweight_in, dweight_out = x.new_zeros(weight_in.shape), x.new_zeros(weight_out.shape)
    dbias = x.new_zeros(0 if bias is None else bias.shape)
    for token, expert, group in _groups(offsets, experts):
        in_group, gates_m1, w_in = rows[group], gates_n1[group], weight_in[token, expert]
        x_md, dy_md = x_nd.index_select(0, in_group), dy_nd.index_select(0, in_group)
        if inner.shape[0]:
            product = inner[group]
        else:
            product = torch.mm(x_md, w_in)
            if bias is not None:
                product += bias[token, expert]
        dhidden = torch.mm(dy_md, weight_out[token, expert].T)
        hidden, pull_back = _activate_with_gradient(product, activation)
        dgates[order[group]] = (dhidden * hidden).sum(1)
        torch.mm(hidden.mul_(gates_m1).T, dy_md, out=dweight_out[token, expert])
        dinner = pull_back(dhidden.mul_(gates_m1))
        torch.mm(x_md.T, dinner, out=dweight_in[token, expert])
        if bias is not None:
            torch.sum(dinner, 0, out=dbias[token, expert])
        dx_nd.index_add_(0, in_group, torch.mm(dinner, w_in.T).to(dx_nd.dtype))
    return dx_nd.view(x.shape).to(x.dtype), dweight_in, dweight_out, dgates.view(gates.shape), dbias


def _groups(offsets: Tensor, experts: int) -> Iterator[tuple[int, int, slice]]:
    """Token, expert and place among the sorted pairs of each group that is not empty."""
    for group, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if begin < end:
            yield group // experts, group % experts, slice(begin, end)


def _activate(inner: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return functional.gelu(inner)
    gate, up = inner.chunk(2, dim=1)
    return functional.silu(gate).mul_(up)


def _activate_with_gradient(inner: Tensor, activation: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The hidden layer, and from its gradient that of ``inner``."""
    if activation == "gelu":
        return functional.gelu(inner), lambda dhidden: torch.ops.aten.gelu_backward(dhidden, inner)
    gate, up = inner.chunk(2, dim=1)
    opened = functional.silu(gate)
    return opened * up, lambda dhidden: torch.cat([torch.ops.aten.silu_backward(dhidden * up, gate), opened * dhidden], dim=1)
