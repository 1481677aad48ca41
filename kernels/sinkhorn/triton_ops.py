# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Sinkhorn in Triton: a program holds a whole matrix through all iterations; logits are read once, the matrix is written once.

The backward pass makes the matrix after every step again from the duals, which `kernels.sinkhorn.cpu` describes. One kernel goes back
through the iterations, a program for each matrix, and writes the gradients of the duals alone; with them every element of the gradient
is a sum of its own, which a second kernel takes in many programs. (One kernel for both would hold two matrices, and spill.)

A matrix must fit the registers of one program (`MAX_SIZE`); larger ones are left to plain torch. n is a compile-time constant, so that
addresses take no registers.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.op import KernelSpec, Shape
from kernels.sinkhorn.reference import NEGLIGIBLE as _NEGLIGIBLE

MAX_SIZE = 64  # with 128 rows the backward pass spills
NEGLIGIBLE = tl.constexpr(_NEGLIGIBLE)
_WARPS = {16: 1, 32: 4, 64: 8}
_TILE = 512  # elements of a matrix that one program holds where rows are independent


@triton.jit
def _logits(X, TEMPERATURE, at, inside):
    """A; minus infinity beyond the matrix."""
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, x / tl.load(TEMPERATURE), float("-inf"))


@triton.jit
def _dual(x, valid, axis: tl.constexpr):
    """−logsumexp of x over an axis; zero beyond the matrix."""
    largest = tl.where(valid, tl.max(x, axis=axis), 0.0)
    total = tl.sum(tl.exp(x - tl.expand_dims(largest, axis)), axis=axis)
    return -(largest + tl.log(tl.where(valid, total, 1.0)))


@triton.jit
def _matrix(a, u, v):
    return tl.exp((a + v[None, :]) + u[:, None])


@triton.jit
def _visible(a, u, v):
    """The result: the last matrix, without what is negligible."""
    log = (a + v[None, :]) + u[:, None]
    return tl.where(log < NEGLIGIBLE, 0.0, tl.exp(log))


@triton.jit
def sinkhorn_fwd_kernel(
    X, TEMPERATURE, Y, DUALS, iterations, N: tl.constexpr, SYMMETRIC: tl.constexpr, EVERY: tl.constexpr, BLOCK: tl.constexpr
):
    """One matrix Y [N, N], and its duals [iterations, 2, N], or [1, 2, N] of the last iteration where not EVERY."""
    matrix = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    valid = rows < N
    inside = valid[:, None] & valid[None, :]
    at = rows[:, None] * N + rows[None, :]
    x = tl.load(X + matrix * N * N + at, mask=inside, other=0.0).to(tl.float32)
    if SYMMETRIC:
        x = (x + tl.trans(x)) / 2
    a = tl.where(inside, x / tl.load(TEMPERATURE), float("-inf"))
    u = tl.zeros((BLOCK,), tl.float32)
    v = tl.zeros((BLOCK,), tl.float32)
    kept = DUALS + matrix * (iterations if EVERY else 1) * 2 * N
    for _ in range(iterations):
        v = _dual(a + u[:, None], valid, 0)
        u = _dual(a + v[None, :], valid, 1)
        tl.store(kept + rows, v, mask=valid)
        tl.store(kept + N + rows, u, mask=valid)
        if EVERY:
            kept += 2 * N
    tl.store(Y + matrix * N * N + at, _visible(a, u, v).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def sinkhorn_bwd_duals_kernel(
    DY, X, TEMPERATURE, DUALS, DDUALS, iterations, N: tl.constexpr, EVERY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """DDUALS [iterations, 2, N] of one matrix: the gradients of its duals. Where not EVERY, their sums [1, 2, N] at the last matrix."""
    matrix = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    valid = rows < N
    inside = valid[:, None] & valid[None, :]
    at = rows[:, None] * N + rows[None, :]
    a = _logits(X + matrix * N * N, TEMPERATURE, at, inside)
    step = (matrix * iterations + iterations - 1) * 2 * N if EVERY else matrix * 2 * N
    v = tl.load(DUALS + step + rows, mask=valid, other=0.0)
    u = tl.load(DUALS + step + N + rows, mask=valid, other=0.0)
    g = tl.load(DY + matrix * N * N + at, mask=inside, other=0.0).to(tl.float32) * _visible(a, u, v)
    du = tl.sum(g, axis=1)
    dv = tl.sum(g, axis=0)
    if EVERY:
        for back in range(iterations):
            v = tl.load(DUALS + step + rows, mask=valid, other=0.0)
            dv -= tl.sum(_matrix(a, u, v) * du[:, None], axis=0)
            tl.store(DDUALS + step + rows, dv, mask=valid)
            tl.store(DDUALS + step + N + rows, du, mask=valid)
            u = tl.load(DUALS + step - N + rows, mask=valid & (back + 1 < iterations), other=0.0)
            du = -tl.sum(_matrix(a, u, v) * dv[None, :], axis=1)
            dv = tl.zeros((BLOCK,), tl.float32)
            step -= 2 * N
    else:
        p = _matrix(a, u, v)
        alpha, beta = du, dv
        for _ in range(iterations):
            beta = dv - tl.sum(p * alpha[:, None], axis=0)
            alpha = du - tl.sum(p * beta[None, :], axis=1)
        tl.store(DDUALS + step + rows, beta, mask=valid)
        tl.store(DDUALS + step + N + rows, alpha, mask=valid)


@triton.jit
def sinkhorn_bwd_kernel(
    DY, X, TEMPERATURE, DUALS, DDUALS, DA, iterations,
    N: tl.constexpr, EVERY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of DA [N, N], float32: what the result passes on, less what passes through the duals of every step."""
    matrix = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    row, column = rows < N, columns < N
    inside = row[:, None] & column[None, :]
    at = rows[:, None] * N + columns[None, :]
    a = _logits(X + matrix * N * N, TEMPERATURE, at, inside)
    kept = iterations if EVERY else 1
    step = (matrix * kept + kept - 1) * 2 * N
    u = tl.load(DUALS + step + N + rows, mask=row, other=0.0)
    v = tl.load(DUALS + step + columns, mask=column, other=0.0)
    g = tl.load(DY + matrix * N * N + at, mask=inside, other=0.0).to(tl.float32) * _visible(a, u, v)
    for back in range(kept):
        v = tl.load(DUALS + step + columns, mask=column, other=0.0)
        dv = tl.load(DDUALS + step + columns, mask=column, other=0.0)
        du = tl.load(DDUALS + step + N + rows, mask=row, other=0.0)
        g -= _matrix(a, u, v) * du[:, None]
        if EVERY:
            u = tl.load(DUALS + step - N + rows, mask=row & (back + 1 < kept), other=0.0)
        g -= _matrix(a, u, v) * dv[None, :]
        step -= 2 * N
    tl.store(DA + matrix * N * N + at, g / tl.load(TEMPERATURE), mask=inside)


def supports(logits: Tensor) -> bool:
    """Whether a matrix of ``logits [G, n, n]`` fits one program, in a dtype that the kernels take."""
    return logits.shape[-1] <= MAX_SIZE and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)


def forward(logits: Tensor, temperature: Tensor, iterations: int, symmetric: bool, implicit: bool) -> tuple[Tensor, Tensor]:
    """As `kernels.sinkhorn.cpu.forward`; ``logits`` contiguous."""
    matrices, n, _ = logits.shape
    block, warps, _ = _blocks(n)
    y = torch.empty_like(logits)
    duals = torch.empty(matrices, 1 if implicit else iterations, 2, n, dtype=torch.float32, device=logits.device)
    if logits.numel():
        sinkhorn_fwd_kernel[(matrices,)](
            logits, temperature, y, duals, iterations, N=n, SYMMETRIC=symmetric, EVERY=not implicit, BLOCK=block, num_warps=warps
        )  # fmt: skip
    return y, duals


def backward(dy: Tensor, logits: Tensor, temperature: Tensor, duals: Tensor, iterations: int, symmetric: bool, implicit: bool) -> Tensor:
    """As `kernels.sinkhorn.cpu.backward`; all inputs contiguous."""
    matrices, n, _ = logits.shape
    block, warps, rows = _blocks(n)
    dduals = torch.empty_like(duals)
    da = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if logits.numel():
        given = (dy, _symmetric(logits) if symmetric else logits, temperature, duals, dduals)
        fixed = {"N": n, "EVERY": not implicit, "BLOCK": block}
        sinkhorn_bwd_duals_kernel[(matrices,)](*given, iterations, **fixed, num_warps=warps)
        sinkhorn_bwd_kernel[(matrices, triton.cdiv(n, rows))](*given, da, iterations, **fixed, ROWS=rows, num_warps=4)
    return (_symmetric(da) if symmetric else da).to(logits.dtype)


def _symmetric(x: Tensor) -> Tensor:
    """``(X + Xᵀ) / 2`` in float32: a pass of its own, which spares the kernels a transposed matrix."""
    wide = x.float()
    return (wide + wide.mT) / 2


def specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    """All kernels for the sizes and the symmetry that ``shapes`` lead to: both gradients in float32, the unrolled one in bfloat16."""
    result = []
    for n, symmetric in sorted({(n, bool(symmetric)) for _, n, _, symmetric in shapes if n <= MAX_SIZE}):
        block, warps, rows = _blocks(n)
        for dtype, every in (("fp32", True), ("fp32", False), ("bf16", True)):
            back: dict[str, Any] = {"N": n, "EVERY": every, "BLOCK": block}
            there = back | {"SYMMETRIC": symmetric}
            read = {"X": f"*{dtype}", "TEMPERATURE": "*fp32", "DUALS": "*fp32", "iterations": "i32"}
            fwd = read | {"Y": f"*{dtype}"} | dict.fromkeys(there, "constexpr")
            duals = (
                read | {"X": "*fp32" if symmetric else f"*{dtype}", "DY": f"*{dtype}", "DDUALS": "*fp32"} | dict.fromkeys(back, "constexpr")
            )
            bwd = duals | {"DA": "*fp32", "ROWS": "constexpr"}
            suffix = f"{dtype}_{n}{'_symmetric' if symmetric else ''}{'' if every else '_implicit'}"
            result.append(KernelSpec(f"sinkhorn_fwd_{suffix}", sinkhorn_fwd_kernel, fwd, there, warps))
            result.append(KernelSpec(f"sinkhorn_bwd_duals_{suffix}", sinkhorn_bwd_duals_kernel, duals, back, warps))
            result.append(KernelSpec(f"sinkhorn_bwd_{suffix}", sinkhorn_bwd_kernel, bwd, back | {"ROWS": rows}, 4))
    return result


def _blocks(n: int) -> tuple[int, int, int]:
    """The padded size of a matrix of ``n`` rows, the warps that hold it, and how many rows a program takes where rows are independent."""
    block = max(16, triton.next_power_of_2(n))
    return block, _WARPS[block], _TILE // block
