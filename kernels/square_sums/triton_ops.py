# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Sums of squares in Triton: x is read once each way, and dx written once.

A program handles BLOCK_M parts, of tokens and parts the axis with the larger stride in x outside, so that what lies together is read
together in either of two layouts; the sums, which are fewer, are written wherever they belong. Columns are taken BLOCK_N at a time. The
width is a compile-time constant, and so is whether the parts of a row lie together: only then are addresses of narrow parts known to be
aligned, and loaded several numbers at once. Parts are counted in 32 bits, offsets in 64.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.op import KernelSpec, Shape
from kernels.tiles import integers

MAX_PARTS = 2**30
_TILE = 2048  # numbers that a program holds at a time
_COLUMNS = 256  # of a block at most
_WARPS = 4


@triton.jit
def _places(parts, OUTER, INNER, b_stride, o_stride, i_stride):
    """The offsets of parts, counted along the inner axis, then the outer one, then the batch."""
    rows = parts // INNER
    inner, outer, batch = parts % INNER, rows % OUTER, rows // OUTER
    return batch.to(tl.int64) * b_stride + outer.to(tl.int64) * o_stride + inner.to(tl.int64) * i_stride


@triton.jit
def square_sums_fwd_kernel(
    X, S, M, OUTER, INNER, x_b, x_o, x_i, s_b, s_o, s_i,
    N: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """S for BLOCK_M of the M parts, each the sum of N squares."""
    parts = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    X += _places(parts, OUTER, INNER, x_b, x_o, N if TOGETHER else x_i)[:, None]
    squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, N, BLOCK_N):
        mask = (parts < M)[:, None] & (start + cols < N)[None, :]
        x = tl.load(X + (start + cols)[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += x * x
    tl.store(S + _places(parts, OUTER, INNER, s_b, s_o, s_i), tl.sum(squares, axis=1), mask=parts < M)


@triton.jit
def square_sums_bwd_kernel(
    DS, X, DX, M, OUTER, INNER, s_b, s_o, s_i, x_b, x_o, x_i, dx_b, dx_o, dx_i,
    N: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """DX = 2·x·ds for BLOCK_M of the M parts."""
    parts = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    X += _places(parts, OUTER, INNER, x_b, x_o, N if TOGETHER else x_i)[:, None]
    DX += _places(parts, OUTER, INNER, dx_b, dx_o, N if TOGETHER else dx_i)[:, None]
    factor = 2 * tl.load(DS + _places(parts, OUTER, INNER, s_b, s_o, s_i), mask=parts < M, other=0.0)[:, None]
    for start in range(0, N, BLOCK_N):
        mask = (parts < M)[:, None] & (start + cols < N)[None, :]
        x = tl.load(X + (start + cols)[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + (start + cols)[None, :], (x * factor).to(DX.dtype.element_ty), mask=mask)


def supports(x: Tensor) -> bool:
    """Whether the parts of ``x [B, T, P, w]`` can be counted in 32 bits, in a dtype that the kernels take."""
    return x.shape[:3].numel() <= MAX_PARTS and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def forward(x: Tensor) -> Tensor:
    """``x [B, T, P, w]``, the last axis together, → ``[B, T, P]``, contiguous, in float32."""
    sums = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    _launch(square_sums_fwd_kernel, x, (x, sums))
    return sums


def backward(dsums: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x [B, T, P, w]``, which lies in memory as x does, given that of the sums ``[B, T, P]``."""
    dx = torch.empty_like(x)
    _launch(square_sums_bwd_kernel, x, (dsums, x, dx))
    return dx


def _launch(kernel: Any, x: Tensor, tensors: Sequence[Tensor]) -> None:
    """Run a kernel over the parts of x; ``tensors`` are its arguments in order, each with the axes of x or with those of the sums."""
    order = (0, 1, 2) if x.stride(1) >= x.stride(2) else (0, 2, 1)
    _, outer, inner = (x.shape[axis] for axis in order)
    strides = [given.stride(axis) for given in tensors for axis in order]
    together = all(given.stride(order[2]) == x.shape[3] for given in tensors if given.ndim == 4)
    if parts := x.shape[:3].numel():
        constants = _constants(x.shape[3], together)
        kernel[(triton.cdiv(parts, constants["BLOCK_M"]),)](*tensors, parts, outer, inner, *strides, **constants, num_warps=_WARPS)


def specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    """Both kernels for the widths of ``shapes``, whose parts lie together, in float32 and bfloat16."""
    result = []
    sizes = integers("M OUTER INNER")
    s, x, dx = (integers(f"{name}_b {name}_o {name}_i") for name in ("s", "x", "dx"))
    for width in sorted({shape[3] for shape in shapes}):
        constants = _constants(width, together=True)
        blocks = dict.fromkeys(constants, "constexpr")
        for dtype in ("fp32", "bf16"):
            tensor, suffix = f"*{dtype}", f"{dtype}_{width}"
            fwd = {"X": tensor, "S": "*fp32"} | sizes | x | s | blocks
            bwd = {"DS": "*fp32", "X": tensor, "DX": tensor} | sizes | s | x | dx | blocks
            result.append(KernelSpec(f"square_sums_fwd_{suffix}", square_sums_fwd_kernel, fwd, constants, _WARPS))
            result.append(KernelSpec(f"square_sums_bwd_{suffix}", square_sums_bwd_kernel, bwd, constants, _WARPS))
    return result


def _constants(width: int, together: bool) -> dict[str, Any]:
    """The compile-time arguments of both kernels: blocks of about `_TILE` numbers, 16 for each thread."""
    block_n = min(_COLUMNS, triton.next_power_of_2(width))
    return {"N": width, "TOGETHER": together, "BLOCK_M": _TILE // block_n, "BLOCK_N": block_n}
