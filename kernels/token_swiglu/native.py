# SPDX-License-Identifier: Apache-2.0
"""Per-token SwiGLU on the CPU: batched products over tokens, and between them one loop in C++ each way.

The product with ``gate_up`` is kept for the backward pass, and parted tokens are gathered: see `kernels.token_swiglu.cpu`.
"""

from pathlib import Path

import torch
from torch import Tensor

from kernels import native
from kernels.token_swiglu.layout import rows, unwritten

_SOURCE = Path(__file__).with_name("cpu.cpp")
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def supports(x: Tensor) -> bool:
    """Whether there is a loop for the dtype of ``x``, and a compiler for it."""
    return x.dtype in _NAMES and native.load(_SOURCE) is not None


def forward(x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x``, of either form, → ``y`` in the same, see `kernels.token_swiglu.layout`, and ``x @ gate_up`` as ``[T, B, 2H]``."""
    x_tbd = _rows(x)
    product = torch.bmm(x_tbd, gate_up)
    hidden = product.new_empty(*product.shape[:2], down.shape[1])
    name = f"swiglu_{_NAMES[x.dtype]}"
    native.call(_SOURCE, name, product, _by_row(scale), hidden, *_sizes(hidden), torch.get_num_threads())
    y = torch.bmm(hidden, down) if residual is None else torch.baddbmm(x_tbd if residual is x else _rows(residual), hidden, down)
    return _in_form_of(x, y), product


def backward(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, product: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.token_swiglu.cpu.backward`."""
    x_tbd, dy_tbd = _rows(x), _rows(dy)
    if not product.shape[-1]:
        product = torch.bmm(x_tbd, gate_up)
    dhidden = torch.bmm(dy_tbd, down.transpose(1, 2))
    hidden, dproduct = torch.empty_like(dhidden), torch.empty_like(product)
    dscale_tb = None if scale is None else scale.new_empty(hidden.shape[:2])
    name = f"swiglu_backward_{_NAMES[x.dtype]}"
    native.call(
        _SOURCE, name, dhidden, product, _by_row(scale), hidden, dproduct, dscale_tb, *_sizes(hidden), torch.get_num_threads()
    )  # fmt: skip
    dx = _in_form_of(x, torch.bmm(dproduct, gate_up.transpose(1, 2)))
    ddown, dgate_up = torch.bmm(hidden.transpose(1, 2), dy_tbd), torch.bmm(x_tbd.transpose(1, 2), dproduct)
    return dx, dgate_up, ddown, product.new_empty(0, dtype=torch.float32) if dscale_tb is None else dscale_tb.t().contiguous()


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
