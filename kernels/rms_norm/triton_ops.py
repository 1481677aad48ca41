# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""RMSNorm in Triton: one read of x and one write of y; the backward pass reads x and dy once and writes dx once.

A program handles BLOCK_M whole rows of up to BLOCK_N columns, so a row must fit one block (`MAX_WIDTH`). The gradient of γ is summed over
the rows of each program in registers and over the programs by one small reduction outside, without atomics: results do not depend on
the order in which programs run.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.op import KernelSpec, Shape

MAX_WIDTH = 4096  # 8192 columns spill in the backward pass
MAX_PROGRAMS = 256  # of the backward pass: each writes one partial gradient of γ
_TILE = 2048  # elements of x that one program holds at a time: with 4096 the backward pass spills


@triton.jit
def rms_norm_fwd_kernel(X, W, Y, SCALE, M, N, eps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y = γ·x·scale for BLOCK_M rows; scale [M] float32 is kept for the backward pass."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    at = rows[:, None] * N + cols[None, :]
    x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)  # [BLOCK_M]
    w = tl.load(W + cols, mask=cols < N, other=0.0).to(tl.float32)
    y = x * scale[:, None] * w[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)
    tl.store(SCALE + rows, scale, mask=rows < M)


@triton.jit
def rms_norm_bwd_kernel(DY, X, W, SCALE, DX, DW, M, N, rows_per_program, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dx for ``rows_per_program`` rows, and their share of dγ in DW [programs, N] float32."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    w = tl.load(W + cols, mask=cols < N, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_N,), tl.float32)
    first = program.to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        at = rows[:, None] * N + cols[None, :]
        scale = tl.load(SCALE + rows, mask=rows < M, other=0.0)[:, None]
        normed = tl.load(X + at, mask=mask, other=0.0).to(tl.float32) * scale
        dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
        dw += tl.sum(dy * normed, axis=0)
        g = dy * w[None, :]
        inner = tl.sum(g * normed, axis=1)[:, None] / N
        dx = (g - normed * inner) * scale
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=mask)
    tl.store(DW + program.to(tl.int64) * N + cols, dw, mask=cols < N)


def supports(x: Tensor) -> bool:
    """Whether a row of ``x [M, N]`` fits one block, in a dtype that the kernels take."""
    return x.shape[-1] <= MAX_WIDTH and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x [M, N]`` (contiguous) → ``y [M, N]`` and the reciprocal root mean square ``[M]`` of each row."""
    m, n = x.shape
    block_m, block_n, warps = _blocks(n)
    y = torch.empty_like(x)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    if m:
        grid = (triton.cdiv(m, block_m),)
        rms_norm_fwd_kernel[grid](x, weight, y, scale, m, n, eps, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps)
    return y, scale


def backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x [M, N]`` and of ``weight [N]``; all inputs contiguous."""
    m, n = x.shape
    block_m, block_n, warps = _blocks(n)
    dx = torch.empty_like(x)
    programs = max(1, min(MAX_PROGRAMS, triton.cdiv(m, block_m)))
    rows = triton.cdiv(triton.cdiv(m, programs), block_m) * block_m
    partial = torch.empty(programs, n, dtype=torch.float32, device=x.device)
    rms_norm_bwd_kernel[(programs,)](
        dy, x, weight, scale, dx, partial, m, n, rows, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


def specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    """Both kernels for the block sizes that ``shapes`` lead to, in float32 and bfloat16."""
    result = []
    for block_m, block_n, warps in sorted({_blocks(n) for _, n in shapes}):
        for dtype in ("fp32", "bf16"):
            constants: dict[str, Any] = {"BLOCK_M": block_m, "BLOCK_N": block_n}
            tensor, suffix = f"*{dtype}", f"{dtype}_{block_m}x{block_n}"
            blocks = dict.fromkeys(constants, "constexpr")
            fwd = {"X": tensor, "W": tensor, "Y": tensor, "SCALE": "*fp32", "M": "i32", "N": "i32", "eps": "fp32"} | blocks
            bwd = {"DY": tensor, "X": tensor, "W": tensor, "SCALE": "*fp32", "DX": tensor, "DW": "*fp32"}
            bwd |= {"M": "i32", "N": "i32", "rows_per_program": "i32"} | blocks
            result.append(KernelSpec(f"rms_norm_fwd_{suffix}", rms_norm_fwd_kernel, fwd, constants, warps))
            result.append(KernelSpec(f"rms_norm_bwd_{suffix}", rms_norm_bwd_kernel, bwd, constants, warps))
    return result


def _blocks(n: int) -> tuple[int, int, int]:
    """Rows and columns of a block, and its warps, for rows of ``n`` elements: about `_TILE` elements, 16 for each thread."""
    block_n = max(16, triton.next_power_of_2(n))
    block_m = max(1, _TILE // block_n)
    return block_m, block_n, max(4, block_n // 512)
