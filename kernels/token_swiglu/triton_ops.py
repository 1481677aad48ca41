# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Per-token SwiGLU in Triton: matrix products grouped by token, in three kernels.

The forward pass forms the gate's and the up matrix's columns of a tile in one pass over x, applies scale and SwiGLU before anything is
written, and multiplies by the down matrix with the residual added at the end. The backward pass keeps nothing of the hidden width: one
kernel forms g, u and dy @ downᵀ of the same tile, each a sum over D, and writes the hidden values and the gradient of
``x @ gate_up``; three plain products follow. Keeping g and u instead would spare 4·B·T·D·H of 22·B·T·D·H operations, and write and later
read 2·B·T·H values: at two bytes each, D / 2 operations a byte, which an H100 does faster than it moves the byte up to D of about 600.
It would also hold 2H / D times the memory of the input until the backward pass. Keeping silu(g)·u would not spare forming g and u.

The scale's gradient is summed over H in each program and over the programs of a row outside: no atomics. Products of float32 are those of
float32, or of TF32 where `torch.set_float32_matmul_precision` allows it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.op import KernelSpec, Shape
from kernels.tiles import Tile, dot, integers, mode_of, options, spec, together

# By how products are formed: of two-byte elements, of float32 as TF32, of float32 as they are. The largest tried that do not spill in
# `kernels.aot`.
UP = {"half": Tile(128, 64, 64, 8, 3), "tf32": Tile(64, 64, 32, 8, 3), "ieee": Tile(64, 64, 32, 8, 3)}
HIDDEN = {"half": Tile(64, 64, 64, 8, 3), "tf32": Tile(64, 64, 32, 8, 3), "ieee": Tile(64, 64, 32, 16, 3)}
PRODUCT = {"half": Tile(128, 128, 64, 8, 3), "tf32": Tile(128, 64, 32, 8, 3), "ieee": Tile(64, 64, 32, 16, 3)}
GROUP = 8  # row tiles that follow each other with the same columns, for the cache


@triton.jit
def _place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The row and the column tile of this program: GROUP row tiles share a column tile before the next column's turn."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = program % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def _gate_up(
    X, W, rows, cols, in_rows, in_cols, D, H, x_b,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] each: the gate's and the up matrix's columns of a tile, in one pass over x."""
    depth = tl.arange(0, BLOCK_K)
    x_at = rows[:, None] * x_b + depth[None, :]
    w_at = depth[:, None] * 2 * H + cols[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        in_depth = depth < D - start
        mask = in_depth[:, None] & in_cols[None, :]
        x = tl.load(X + x_at, mask=in_rows[:, None] & in_depth[None, :], other=0.0)
        gate = dot(x, tl.load(W + w_at, mask=mask, other=0.0), gate, WIDE, PRECISION)
        up = dot(x, tl.load(W + H + w_at, mask=mask, other=0.0), up, WIDE, PRECISION)
        X += BLOCK_K
        W += BLOCK_K * 2 * H
    return gate, up


@triton.jit
def token_swiglu_up_kernel(
    X, W, SCALE, HIDDEN, B, D, H, x_t, x_b, scale_t, scale_b,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """silu(g)·u of BLOCK_M rows and BLOCK_N hidden columns of one token, in HIDDEN [T, B, H]."""
    token = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = _place(B, H, BLOCK_M, BLOCK_N, GROUP)
    row, col = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < B - row, cols < H - col
    X += token * x_t + row * x_b
    W += token * D * 2 * H + col
    gate, up = _gate_up(X, W, rows, cols, in_rows, in_cols, D, H, x_b, BLOCK_M, BLOCK_N, BLOCK_K, WIDE, PRECISION)
    if SCALE is not None:
        scale = tl.load(SCALE + token * scale_t + (row + rows) * scale_b, mask=in_rows, other=0.0)[:, None]
        gate, up = gate * scale, up * scale
    hidden = gate * tl.sigmoid(gate) * up
    at = rows[:, None] * H + cols[None, :]
    tl.store(HIDDEN + (token * B + row) * H + col + at, hidden.to(HIDDEN.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])


@triton.jit
def token_swiglu_hidden_bwd_kernel(
    DY, X, W, V, SCALE, HIDDEN, DPRODUCT, DSCALE, B, T, D, H, dy_t, dy_b, x_t, x_b, scale_t, scale_b,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For BLOCK_M rows and BLOCK_N hidden columns of one token, with W for gate_up [T, D, 2H] and V for down [T, H, D].

    Writes silu(g)·u again, in HIDDEN [T, B, H]; the gradient of ``x @ gate_up`` in DPRODUCT [T, B, 2H]; and the columns' share of the
    scale's gradient in DSCALE [column tiles, T, B] float32.
    """
    token = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = _place(B, H, BLOCK_M, BLOCK_N, GROUP)
    row, col = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    rows, cols, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_rows, in_cols = rows < B - row, cols < H - col
    dy_at = rows[:, None] * dy_b + depth[None, :]
    v_at = depth[:, None] + cols[None, :] * D
    X += token * x_t + row * x_b
    DY += token * dy_t + row * dy_b
    W += token * D * 2 * H + col
    V += (token * H + col) * D
    gate, up = _gate_up(X, W, rows, cols, in_rows, in_cols, D, H, x_b, BLOCK_M, BLOCK_N, BLOCK_K, WIDE, PRECISION)
    dhidden = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        in_depth = depth < D - start
        dy = tl.load(DY + dy_at, mask=in_rows[:, None] & in_depth[None, :], other=0.0)
        v = tl.load(V + v_at, mask=in_depth[:, None] & in_cols[None, :], other=0.0)
        dhidden = dot(dy, v, dhidden, WIDE, PRECISION)
        DY += BLOCK_K
        V += BLOCK_K
    scale = tl.full((BLOCK_M, 1), 1.0, tl.float32)
    if SCALE is not None:
        scale = tl.load(SCALE + token * scale_t + (row + rows) * scale_b, mask=in_rows, other=1.0)[:, None]
    gate, up = gate * scale, up * scale
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dup = dhidden * silu
    dgate = dhidden * up * (sigmoid + silu * (1 - sigmoid))
    if SCALE is not None:
        share = tl.sum(dgate * gate + dup * up, axis=1)[:, None]
        share = tl.where(scale == 0, 0.0, share / scale)  # g = u = 0 where the scale is 0, and so is its gradient
        tl.store(DSCALE + (tile_n.to(tl.int64) * T + token) * B + row + rows[:, None], share, mask=in_rows[:, None])
    mask = in_rows[:, None] & in_cols[None, :]
    at = rows[:, None] * H + cols[None, :]
    HIDDEN += (token * B + row) * H + col
    tl.store(HIDDEN + at, (silu * up).to(HIDDEN.dtype.element_ty), mask=mask)
    at += rows[:, None] * H
    DPRODUCT += (token * B + row) * 2 * H + col
    tl.store(DPRODUCT + at, (dgate * scale).to(DPRODUCT.dtype.element_ty), mask=mask)
    tl.store(DPRODUCT + H + at, (dup * scale).to(DPRODUCT.dtype.element_ty), mask=mask)


@triton.jit
def token_product_kernel(
    A, W, R, C, M, N, K, a_t, a_m, a_k, w_t, w_k, w_n, r_t, r_m, c_t, c_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``C = A @ W + R`` for each token: A [T, M, K] and W [T, K, N] of any strides, R (or None) and C [T, M, N] whose columns touch."""
    token = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = _place(M, N, BLOCK_M, BLOCK_N, GROUP)
    row, col = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    rows, cols, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_rows, in_cols = rows < M - row, cols < N - col
    a_at = rows[:, None] * a_m + depth[None, :] * a_k
    w_at = depth[:, None] * w_k + cols[None, :] * w_n
    A += token * a_t + row * a_m
    W += token * w_t + col * w_n
    mask = in_rows[:, None] & in_cols[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if R is not None:
        R += token * r_t + row * r_m + col
        total = tl.load(R + rows[:, None] * r_m + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    for start in range(0, K, BLOCK_K):
        in_depth = depth < K - start
        a = tl.load(A + a_at, mask=in_rows[:, None] & in_depth[None, :], other=0.0)
        w = tl.load(W + w_at, mask=in_depth[:, None] & in_cols[None, :], other=0.0)
        total = dot(a, w, total, WIDE, PRECISION)
        A += BLOCK_K * tl.cast(a_k, tl.int64)
        W += BLOCK_K * tl.cast(w_k, tl.int64)
    C += token * c_t + row * c_m + col
    tl.store(C + rows[:, None] * c_m + cols[None, :], total.to(C.dtype.element_ty), mask=mask)


def supports(x: Tensor) -> bool:
    """Whether the kernels take the dtype of ``x``."""
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def forward(x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, residual: Tensor | None) -> tuple[Tensor, None]:
    """``x [B, T, D]`` → ``y [B, T, D]``, tokens-outermost in memory; nothing is kept for the backward pass."""
    (batch, tokens, dim), hidden_width = x.shape, down.shape[1]
    x, gate_up, down = together(x), gate_up.contiguous(), down.contiguous()
    hidden = torch.empty(tokens, batch, hidden_width, dtype=x.dtype, device=x.device)
    mode = mode_of(x)
    tile = UP[mode]
    if hidden.numel():
        token_swiglu_up_kernel[_grid(tile, batch, hidden_width, tokens)](
            x, gate_up, scale, hidden, batch, dim, hidden_width, x.stride(1), x.stride(0), *_scale_strides(scale),
            GROUP=GROUP, **options(tile, mode),
        )  # fmt: skip
    y = torch.empty(tokens, batch, dim, dtype=x.dtype, device=x.device)
    _product(hidden, down, y, None if residual is None else together(residual).transpose(0, 1))
    return y.transpose(0, 1), None


def backward(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, _: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``gate_up``, ``down`` and ``scale``, the last one empty where there is no scale."""
    (batch, tokens, dim), width = x.shape, down.shape[1]
    dy, x, gate_up, down = together(dy), together(x), gate_up.contiguous(), down.contiguous()
    hidden = torch.empty(tokens, batch, width, dtype=x.dtype, device=x.device)
    dproduct = torch.empty(tokens, batch, 2 * width, dtype=x.dtype, device=x.device)
    mode = mode_of(x)
    tile = HIDDEN[mode]
    shares = None if scale is None else torch.empty(triton.cdiv(width, tile.n), tokens, batch, dtype=torch.float32, device=x.device)
    if hidden.numel():
        token_swiglu_hidden_bwd_kernel[_grid(tile, batch, width, tokens)](
            dy, x, gate_up, down, scale, hidden, dproduct, shares, batch, tokens, dim, width,
            dy.stride(1), dy.stride(0), x.stride(1), x.stride(0), *_scale_strides(scale),
            GROUP=GROUP, **options(tile, mode),
        )  # fmt: skip
    dx = torch.empty(tokens, batch, dim, dtype=x.dtype, device=x.device)
    dgate_up, ddown = torch.empty_like(gate_up), torch.empty_like(down)
    _product(dproduct, gate_up.transpose(1, 2), dx)
    _product(x.permute(1, 2, 0), dproduct, dgate_up)
    _product(hidden.transpose(1, 2), dy.transpose(0, 1), ddown)
    return dx.transpose(0, 1), dgate_up, ddown, x.new_empty(0) if shares is None else shares.sum(0).t().contiguous()


def _product(a: Tensor, w: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
    """``out = a @ w + residual`` for each token: ``[T, M, K]``, ``[T, K, N]``, ``[T, M, N]``."""
    tokens, m, n = out.shape
    if not out.numel():
        return
    mode = mode_of(out)
    tile = PRODUCT[mode]
    r_strides = (0, 0) if residual is None else residual.stride()[:2]
    token_product_kernel[_grid(tile, m, n, tokens)](
        a, w, residual, out, m, n, a.shape[2], *a.stride(), *w.stride(), *r_strides, *out.stride()[:2], GROUP=GROUP, **options(tile, mode)
    )


def _scale_strides(scale: Tensor | None) -> tuple[int, int]:
    return (0, 0) if scale is None else (scale.stride(1), scale.stride(0))


def _grid(tile: Tile, m: int, n: int, tokens: int) -> tuple[int, int]:
    return triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), tokens


def specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    """All kernels with scale and residual, in bfloat16 and in both ways of float32; one size of tiles serves all shapes."""
    if not shapes:
        return []
    result: list[KernelSpec] = []
    group: dict[str, Any] = {"GROUP": GROUP}
    for mode, tensor in (("half", "*bf16"), ("tf32", "*fp32"), ("ieee", "*fp32")):
        up = {"X": tensor, "W": tensor, "SCALE": "*fp32", "HIDDEN": tensor} | integers("B D H x_t x_b scale_t scale_b")
        hidden = {"DY": tensor, "X": tensor, "W": tensor, "V": tensor, "SCALE": "*fp32", "HIDDEN": tensor, "DPRODUCT": tensor}
        hidden |= {"DSCALE": "*fp32"} | integers("B T D H dy_t dy_b x_t x_b scale_t scale_b")
        product = {"A": tensor, "W": tensor, "R": tensor, "C": tensor}
        product |= integers("M N K a_t a_m a_k w_t w_k w_n r_t r_m c_t c_m")
        result += [
            spec(f"token_swiglu_up_{mode}", token_swiglu_up_kernel, up, UP[mode], mode, group),
            spec(f"token_swiglu_hidden_bwd_{mode}", token_swiglu_hidden_bwd_kernel, hidden, HIDDEN[mode], mode, group),
            spec(f"token_product_down_{mode}", token_product_kernel, product, PRODUCT[mode], mode, group | {"a_k": 1, "w_n": 1}),
            spec(
                f"token_product_dx_{mode}",
                token_product_kernel,
                product,
                PRODUCT[mode],
                mode,
                group | {"a_k": 1, "w_k": 1, "R": None},
            ),
            spec(
                f"token_product_dweight_{mode}",
                token_product_kernel,
                product,
                PRODUCT[mode],
                mode,
                group | {"a_m": 1, "w_n": 1, "R": None},
            ),
        ]
    return result
