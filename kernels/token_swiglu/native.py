# SPDX-License-Identifier: Apache-2.0
"""Per-token SwiGLU on the CPU: batched products over tokens, and between them one loop in C++ each way.

The product with ``gate_up`` is kept for the backward pass, and parted tokens are gathered: see `kernels.token_swiglu.cpu`. Everything else
of the hidden width is held for a few tokens at a time, so that it is still in the cache where it is read next.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kernels import native
from kernels.token_swiglu.layout import rows, unwritten

_SOURCE = Path(__file__).with_name("cpu.cpp")
_TOGETHER = 1 << 19  # values of the hidden layer that are held at a time, if that is one token's or more
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def supports(x: Tensor) -> bool:
    """Whether there is a loop for the dtype of ``x``, and a compiler for it."""
    return x.dtype in _NAMES and native.load(_SOURCE) is not None


def forward(x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x``, of either form, → ``y`` in the same, see `kernels.token_swiglu.layout`, and ``x @ gate_up`` as ``[T, B, 2H]``."""
    x_tbd = _rows(x)
    residual_tbd = None if residual is None else x_tbd if residual is x else _rows(residual)
    product, y, scale_tb = _like(x_tbd, gate_up.shape[2]), _like(x_tbd), _by_row(scale)
    name = f"swiglu_{_NAMES[x.dtype]}"
    held = _like(x_tbd, down.shape[1], _together(x_tbd, down.shape[1]))
    for some in _tokens(x_tbd, len(held)):
        inner = _product(x_tbd[some], gate_up[some], product[some])
        hidden = held[: len(inner)]
        native.call(_SOURCE, name, inner, _part(scale_tb, some), hidden, *_sizes(hidden), torch.get_num_threads())
        _product(hidden, down[some], y[some], None if residual_tbd is None else residual_tbd[some])
    return _in_form_of(x, y), product


def backward(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, product: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.token_swiglu.cpu.backward`."""
    x_tbd, dy_tbd = _rows(x), _rows(dy)
    if not product.shape[-1]:
        product = torch.bmm(x_tbd, gate_up)
    dx, dgate_up, ddown = _like(x_tbd), torch.empty_like(gate_up), torch.empty_like(down)
    scale_tb, dscale_tb = _by_row(scale), None if scale is None else scale.new_empty(x_tbd.shape[:2])
    name = f"swiglu_backward_{_NAMES[x.dtype]}"
    together = _together(x_tbd, down.shape[1])
    held = [_like(x_tbd, width, together) for width in (down.shape[1], down.shape[1], gate_up.shape[2])]
    for some in _tokens(x_tbd, together):
        inner = product[some]
        dhidden, hidden, dinner = (buffer[: len(inner)] for buffer in held)
        _product(dy_tbd[some], down[some].mT, dhidden)
        scales = _part(scale_tb, some), hidden, dinner, _part(dscale_tb, some)
        native.call(_SOURCE, name, dhidden, inner, *scales, *_sizes(hidden), torch.get_num_threads())
        _product(dinner, gate_up[some].mT, dx[some])
        _product(hidden.mT, dy_tbd[some], ddown[some])
        _product(x_tbd[some].mT, dinner, dgate_up[some])
    dscale = product.new_empty(0, dtype=torch.float32) if dscale_tb is None else dscale_tb.t().contiguous()
    return _in_form_of(x, dx), dgate_up, ddown, dscale


def _product(a: Tensor, b: Tensor, out: Tensor, onto: Tensor | None = None) -> Tensor:
    """``onto + a @ b``, token by token, into ``out``; of one token alone by the form for matrices, which bfloat16 has a faster one of."""
    if len(a) == 1:
        a, b, single = a[0], b[0], out[0]
        torch.mm(a, b, out=single) if onto is None else torch.addmm(onto[0], a, b, out=single)
    else:
        torch.bmm(a, b, out=out) if onto is None else torch.baddbmm(onto, a, b, out=out)
    return out


def _together(x_tbd: Tensor, width: int) -> int:
    """How many tokens' hidden layers are held at a time."""
    return min(len(x_tbd), max(1, _TOGETHER // max(1, x_tbd.shape[1] * width)))


def _tokens(x_tbd: Tensor, together: int) -> Iterator[slice]:
    """All tokens, so many at a time."""
    return (slice(first, first + together) for first in range(0, len(x_tbd), max(1, together)))


def _like(x_tbd: Tensor, width: int | None = None, tokens: int | None = None) -> Tensor:
    """Of the same tokens and rows, or of fewer tokens; contiguous."""
    return x_tbd.new_empty(len(x_tbd) if tokens is None else tokens, x_tbd.shape[1], x_tbd.shape[2] if width is None else width)


def _part(x: Tensor | None, some: slice) -> Tensor | None:
    return None if x is None else x[some]


def _rows(x: Tensor) -> Tensor:
    """See `kernels.token_swiglu.layout.rows`."""
    if x.ndim == 3 or x.stride(3) != 1:
        return rows(x)
    batch, tokens, parts, width = x.shape
    gathered = x.new_empty(tokens, batch, parts * width)
    _move(x, gathered.transpose(0, 1).unflatten(2, (parts, width)))
    return gathered


def _in_form_of(x: Tensor, rows_tbd: Tensor) -> Tensor:
    """See `kernels.token_swiglu.layout.in_form_of`."""
    if x.ndim == 3:
        return rows_tbd.transpose(0, 1)
    parted = unwritten(x)
    _move(rows_tbd.transpose(0, 1).unflatten(2, x.shape[2:]), parted)
    return parted


def _move(source: Tensor, target: Tensor) -> None:
    """Copy parts ``[B, T, P, w]`` whose numbers are together in both."""
    sizes = (*source.shape[:3], source.shape[3] * source.itemsize)
    strides = [stride * source.itemsize for x in (source, target) for stride in x.stride()[:3]]
    native.call(_SOURCE, "move_parts", source, target, *sizes, *strides, torch.get_num_threads())


def _by_row(scale_bt: Tensor | None) -> Tensor | None:
    return None if scale_bt is None else scale_bt.t().contiguous()


def _sizes(hidden_tbh: Tensor) -> tuple[int, int]:
    """Rows and width."""
    tokens, batch, width = hidden_tbh.shape
    return tokens * batch, width
