# SPDX-License-Identifier: Apache-2.0
"""Routed experts on the CPU by a loop in C++ over tokens and experts, for experts that fit into the second cache; see ``cpu.cpp``.

Larger ones are left to the products of `kernels.routed_experts.cpu`, beside which their overhead is nothing.
"""

from pathlib import Path

import torch
from torch import Tensor

from kernels import native
from kernels.routed_experts import cpu

_SOURCE = Path(__file__).with_name("cpu.cpp")
_LARGEST = 64 * 1024  # numbers of an expert's W_in
_FORMATS = {torch.int8: 1, torch.float8_e4m3fn: 2}  # of weights that are not such as x


def supports(x: Tensor, weight_in: Tensor) -> bool:
    """Whether there is a loop for the dtype of ``x``, an expert of ``weight_in [T, E, D, F]`` is small enough, and there is a compiler."""
    fits = weight_in.shape[2] * weight_in.shape[3] <= _LARGEST
    return x.dtype in (torch.float32, torch.bfloat16) and fits and native.load(_SOURCE) is not None


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
    """See `kernels.routed_experts.cpu.forward`.

    Raises:
        ValueError: a choice is not an expert.
    """
    order, offsets = sort_pairs(chosen, weight_in.shape[1])
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    inner = x.new_empty(order.numel() if save else 0, weight_in.shape[3])
    _call(x, onto, weight_in, weight_out, gates, bias, scales, order, offsets, activation, inner, (y, None, None, None, None))
    return y, inner, order, offsets


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
    """See `kernels.routed_experts.cpu.backward`."""
    dx, dweight_in, dweight_out, dgates = (x.new_empty(one.shape) for one in (x, weight_in, weight_out, gates))
    dbias = None if bias is None else x.new_empty(bias.shape)
    found = (dx, dweight_in, dweight_out, dgates, dbias)
    _call(x, dy, weight_in, weight_out, gates, bias, None, order, offsets, activation, inner, found)
    return dx, dweight_in, dweight_out, dgates, x.new_empty(0) if dbias is None else dbias


def sort_pairs(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """See `kernels.routed_experts.cpu.sort_pairs`.

    Raises:
        ValueError: a choice is not an expert.
    """
    tokens, batch, choices = chosen.shape
    order, offsets = chosen.new_empty(chosen.numel()), chosen.new_empty(tokens * experts + 1)
    if native.call(_SOURCE, "sort_pairs", chosen.contiguous(), tokens, batch * choices, experts, order, offsets):
        cpu.check(chosen, experts)
    return order, offsets


def _call(
    x: Tensor,
    start: Tensor | None,
    weight_in: Tensor,
    weight_out: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    scales: tuple[Tensor, Tensor] | None,
    order: Tensor,
    offsets: Tensor,
    activation: str,
    inner: Tensor,
    found: tuple[Tensor | None, ...],
) -> None:
    """Both ways: forward starts from ``start`` and finds y, backward has dy there and finds all gradients."""
    tokens, experts, dim, width = weight_in.shape
    sizes = (tokens, x.shape[1], dim, width, weight_out.shape[2], experts, gates.shape[2], int(activation == "gelu"))
    kinds = (int(x.dtype == torch.bfloat16), _FORMATS.get(weight_in.dtype, 0), int(found[1] is not None))
    rest = [_contiguous(one) for one in (weight_in, weight_out, gates, bias, *(scales or (None, None)))]
    native.call(
        _SOURCE, "routed_experts", *kinds, *sizes, torch.get_num_threads(), *_rows(x), *_rows(start), *rest, order, offsets, inner, *found
    )  # fmt: skip


def _rows(x_tbd: Tensor | None) -> tuple[Tensor | None, int, int]:
    """With a row's numbers together, and the strides of tokens and rows."""
    if x_tbd is None:
        return None, 0, 0
    x_tbd = x_tbd if x_tbd.stride(2) == 1 else x_tbd.contiguous()
    return x_tbd, x_tbd.stride(0), x_tbd.stride(1)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
