# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Per-token SwiGLU in Triton: matrix products grouped by token, in three kernels.

The forward pass forms the gate's and the up matrix's columns of a tile in one pass over x, applies scale and SwiGLU before anything is
written, and multiplies by the down matrix with the residual added at the end. The backward pass keeps nothing of the hidden width: one
kernel forms g, u and dy @ downᵀ of the same tile, each a sum over D, and writes the hidden values and the gradient of
``x @ gate_up``; three plain products follow. Keeping g and u instead would spare 4·B·T·D·H of 22·B·T·D·H operations, and write and later
read 2·B·T·H values: at two bytes each, D / 2 operations a byte, which an H100 does faster than it moves the byte up to D of about 600.
It would also hold 2H / D times the memory of the input until the backward pass. Keeping silu(g)·u would not spare forming g and u.

Parted tokens are read and written where they lie: number k of a token is number k % w of part k // w. The width w of a part is known at
compile time, and 0 stands for whole tokens, whose kernels know nothing of parts.

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
from kernels.tiles import Tile, dot, integers, mode_of, options, spec
from kernels.token_swiglu import operands
from kernels.token_swiglu.layout import unwritten
from kernels.token_swiglu.operands import Matrices, matrices, token_rows

# By how products are formed: of two-byte elements, of float32 as TF32, of float32 as they are. The largest tried that do not spill in
# `kernels.aot`.
UP = {"half": Tile(128, 64, 64, 8, 3), "tf32": Tile(64, 64, 32, 8, 3), "ieee": Tile(64, 64, 32, 8, 3)}
UP_PARTED = UP | {"half": Tile(128, 64, 32, 8, 4)}  # addresses of parts take registers
HIDDEN = {"half": Tile(64, 64, 64, 8, 3), "tf32": Tile(64, 64, 32, 8, 3), "ieee": Tile(64, 64, 32, 16, 3)}
PRODUCT = {"half": Tile(128, 128, 64, 8, 3), "tf32": Tile(128, 64, 32, 8, 3), "ieee": Tile(64, 64, 32, 16, 3)}
GROUP = 8  # row tiles that follow each other with the same columns, for the cache
VECTOR = tl.constexpr(operands.VECTOR)


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
def _token(token, stride, WIDTH: tl.constexpr):
    """Where a token lies. Triton sees for itself what 16 divides; `token_rows` vouches for tokens with parts of whole vectors."""
    if WIDTH == 0 or WIDTH % VECTOR.value != 0:
        return token * stride
    else:
        return tl.multiple_of(token * stride, VECTOR)


@triton.jit
def _moved(numbers, stride, WIDTH: tl.constexpr):
    """How far a pointer moves by ``numbers`` that are ``stride`` apart; one to a token in parts stays at the token's beginning."""
    if WIDTH == 0:
        return numbers * stride
    else:
        return numbers * 0


@triton.jit
def _numbers(first, beyond, stride, part, WIDTH: tl.constexpr):
    """How far numbers ``first + beyond`` of a token lie from a pointer that was `_moved` by ``first``; parts lie ``part`` apart."""
    if WIDTH == 0:
        return beyond * stride
    else:
        k = (first + beyond).to(tl.int32)
        return (k // WIDTH).to(tl.int64) * part + k % WIDTH


@triton.jit
def _gate_up(
    X, W, rows, cols, in_rows, in_cols, D, H, x_b, x_p,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] each: the gate's and the up matrix's columns of a tile, in one pass over x."""
    depth = tl.arange(0, BLOCK_K)
    w_at = depth[:, None] * 2 * H + cols[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        in_depth = depth < D - start
        mask = in_depth[:, None] & in_cols[None, :]
        x_at = rows[:, None] * x_b + _numbers(start, depth, 1, x_p, WIDTH)[None, :]
        x = tl.load(X + x_at, mask=in_rows[:, None] & in_depth[None, :], other=0.0)
        gate = dot(x, tl.load(W + w_at, mask=mask, other=0.0), gate, WIDE, PRECISION)
        up = dot(x, tl.load(W + H + w_at, mask=mask, other=0.0), up, WIDE, PRECISION)
        X += _moved(BLOCK_K, 1, WIDTH)
        W += BLOCK_K * 2 * H
    return gate, up


@triton.jit
def token_swiglu_up_kernel(
    X, W, SCALE, HIDDEN, B, D, H, x_t, x_b, x_p, scale_t, scale_b,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """silu(g)·u of BLOCK_M rows and BLOCK_N hidden columns of one token, in HIDDEN [T, B, H]; x lies in parts of WIDTH."""
    token = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = _place(B, H, BLOCK_M, BLOCK_N, GROUP)
    row, col = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < B - row, cols < H - col
    X += _token(token, x_t, WIDTH) + row * x_b
    W += token * D * 2 * H + col
    gate, up = _gate_up(X, W, rows, cols, in_rows, in_cols, D, H, x_b, x_p, BLOCK_M, BLOCK_N, BLOCK_K, WIDTH, WIDE, PRECISION)
    if SCALE is not None:
        scale = tl.load(SCALE + token * scale_t + (row + rows) * scale_b, mask=in_rows, other=0.0)[:, None]
        gate, up = gate * scale, up * scale
    hidden = gate * tl.sigmoid(gate) * up
    at = rows[:, None] * H + cols[None, :]
    tl.store(HIDDEN + (token * B + row) * H + col + at, hidden.to(HIDDEN.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])


@triton.jit
def token_swiglu_hidden_bwd_kernel(
    DY, X, W, V, SCALE, HIDDEN, DPRODUCT, DSCALE, B, T, D, H, dy_t, dy_b, dy_p, x_t, x_b, x_p, scale_t, scale_b,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For BLOCK_M rows and BLOCK_N hidden columns of one token, with W for gate_up [T, D, 2H] and V for down [T, H, D].

    Writes silu(g)·u again, in HIDDEN [T, B, H]; the gradient of ``x @ gate_up`` in DPRODUCT [T, B, 2H]; and the columns' share of the
    scale's gradient in DSCALE [column tiles, T, B] float32. dy and x lie in parts of WIDTH.
    """
    token = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = _place(B, H, BLOCK_M, BLOCK_N, GROUP)
    row, col = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    rows, cols, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_rows, in_cols = rows < B - row, cols < H - col
    v_at = depth[:, None] + cols[None, :] * D
    X += _token(token, x_t, WIDTH) + row * x_b
    DY += _token(token, dy_t, WIDTH) + row * dy_b
    W += token * D * 2 * H + col
    V += (token * H + col) * D
    gate, up = _gate_up(X, W, rows, cols, in_rows, in_cols, D, H, x_b, x_p, BLOCK_M, BLOCK_N, BLOCK_K, WIDTH, WIDE, PRECISION)
    dhidden = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        in_depth = depth < D - start
        dy_at = rows[:, None] * dy_b + _numbers(start, depth, 1, dy_p, WIDTH)[None, :]
        dy = tl.load(DY + dy_at, mask=in_rows[:, None] & in_depth[None, :], other=0.0)
        v = tl.load(V + v_at, mask=in_depth[:, None] & in_cols[None, :], other=0.0)
        dhidden = dot(dy, v, dhidden, WIDE, PRECISION)
        DY += _moved(BLOCK_K, 1, WIDTH)
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
    A, W, R, C, M, N, K, a_t, a_m, a_k, a_p, w_t, w_k, w_n, w_p, r_t, r_m, r_p, c_t, c_m, c_p,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    A_WIDTH: tl.constexpr, W_WIDTH: tl.constexpr, C_WIDTH: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``C = A @ W + R`` for each token: A [T, M, K] and W [T, K, N] of any strides, R (or None) and C [T, M, N] whose columns touch.

    The rows of A may lie in parts of A_WIDTH, the columns of W in parts of W_WIDTH, and those of R and C in parts of C_WIDTH.
    """
    token = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = _place(M, N, BLOCK_M, BLOCK_N, GROUP)
    row, col = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    rows, cols, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_rows, in_cols = rows < M - row, cols < N - col
    a_rows, a_at = _numbers(row, rows, a_m, a_p, A_WIDTH)[:, None], depth[None, :] * a_k
    if A_WIDTH == 0:  # else the sum would be of 64 bits, and take twice the registers
        a_rows, a_at = 0, a_rows + a_at
    w_at = depth[:, None] * w_k + _numbers(col, cols, w_n, w_p, W_WIDTH)[None, :]
    A += _token(token, a_t, A_WIDTH) + _moved(row, a_m, A_WIDTH)
    W += _token(token, w_t, W_WIDTH) + _moved(col, w_n, W_WIDTH)
    mask = in_rows[:, None] & in_cols[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if R is not None:
        R += _token(token, r_t, C_WIDTH) + row * r_m + _moved(col, 1, C_WIDTH)
        r_cols = _numbers(col, cols, 1, r_p, C_WIDTH)
        total = tl.load(R + rows[:, None] * r_m + r_cols[None, :], mask=mask, other=0.0).to(tl.float32)
    for start in range(0, K, BLOCK_K):
        in_depth = depth < K - start
        a = tl.load(A + a_rows + a_at, mask=in_rows[:, None] & in_depth[None, :], other=0.0)
        w = tl.load(W + w_at, mask=in_depth[:, None] & in_cols[None, :], other=0.0)
        total = dot(a, w, total, WIDE, PRECISION)
        A += BLOCK_K * tl.cast(a_k, tl.int64)
        W += BLOCK_K * tl.cast(w_k, tl.int64)
    C += _token(token, c_t, C_WIDTH) + row * c_m + _moved(col, 1, C_WIDTH)
    c_cols = _numbers(col, cols, 1, c_p, C_WIDTH)
    tl.store(C + rows[:, None] * c_m + c_cols[None, :], total.to(C.dtype.element_ty), mask=mask)


def supports(x: Tensor) -> bool:
    """Whether the kernels take the dtype of ``x``."""
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def forward(x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, residual: Tensor | None) -> tuple[Tensor, None]:
    """``x``, of either form, → ``y`` in the same, see `kernels.token_swiglu.layout`; nothing is kept for the backward pass."""
    (batch, tokens), (hidden_width, dim) = x.shape[:2], down.shape[1:]
    gate_up, down, x_rows = gate_up.contiguous(), down.contiguous(), token_rows(x)
    hidden = torch.empty(tokens, batch, hidden_width, dtype=x.dtype, device=x.device)
    mode = mode_of(x)
    tile = (UP_PARTED if x_rows.width else UP)[mode]
    if hidden.numel():
        token_swiglu_up_kernel[_grid(tile, batch, hidden_width, tokens)](
            x_rows.memory, gate_up, scale, hidden, batch, dim, hidden_width, *x_rows.outer, *_scale_strides(scale),
            WIDTH=x_rows.width, GROUP=GROUP, **options(tile, mode),
        )  # fmt: skip
    y = unwritten(x)
    _product(
        matrices(hidden), matrices(down), token_rows(y), (batch, dim, hidden_width), None if residual is None else token_rows(residual)
    )
    return y, None


def backward(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, scale: Tensor | None, _: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``gate_up``, ``down`` and ``scale``, the last one empty where there is no scale."""
    (batch, tokens), (width, dim) = x.shape[:2], down.shape[1:]
    gate_up, down, x_rows, dy_rows = gate_up.contiguous(), down.contiguous(), token_rows(x), token_rows(dy)
    hidden = torch.empty(tokens, batch, width, dtype=x.dtype, device=x.device)
    dproduct = torch.empty(tokens, batch, 2 * width, dtype=x.dtype, device=x.device)
    mode = mode_of(x)
    tile = HIDDEN[mode]
    shares = None if scale is None else torch.empty(triton.cdiv(width, tile.n), tokens, batch, dtype=torch.float32, device=x.device)
    if hidden.numel():
        token_swiglu_hidden_bwd_kernel[_grid(tile, batch, width, tokens)](
            dy_rows.memory, x_rows.memory, gate_up, down, scale, hidden, dproduct, shares, batch, tokens, dim, width,
            *dy_rows.outer, *x_rows.outer, *_scale_strides(scale), WIDTH=x_rows.width, GROUP=GROUP, **options(tile, mode),
        )  # fmt: skip
    dx, dgate_up, ddown = unwritten(x), torch.empty_like(gate_up), torch.empty_like(down)
    _product(matrices(dproduct), matrices(gate_up).transposed, token_rows(dx), (batch, dim, 2 * width))
    _product(x_rows.transposed, matrices(dproduct), matrices(dgate_up), (dim, 2 * width, batch))
    _product(matrices(hidden).transposed, dy_rows, matrices(ddown), (width, dim, batch))
    return dx, dgate_up, ddown, x.new_empty(0) if shares is None else shares.sum(0).t().contiguous()


def _product(a: Matrices, w: Matrices, out: Matrices, sizes: tuple[int, int, int], residual: Matrices | None = None) -> None:
    """``out = a @ w + residual`` for each token: ``[T, M, K]``, ``[T, K, N]``, ``[T, M, N]``, of sizes M, N and K."""
    if not out.memory.numel():
        return
    (m, n, k), mode = sizes, mode_of(out.memory)
    tile = PRODUCT[mode]
    added, r_strides = (None, (0, 0, 0)) if residual is None else (residual.memory, residual.outer)
    token_product_kernel[_grid(tile, m, n, out.memory.numel() // (m * n))](
        a.memory, w.memory, added, out.memory, m, n, k, *a.strides, *w.strides, *r_strides, *out.outer,
        A_WIDTH=a.width, W_WIDTH=w.width, C_WIDTH=out.width, GROUP=GROUP, **options(tile, mode),
    )  # fmt: skip


def _scale_strides(scale: Tensor | None) -> tuple[int, int]:
    return (0, 0) if scale is None else (scale.stride(1), scale.stride(0))


def _grid(tile: Tile, m: int, n: int, tokens: int) -> tuple[int, int]:
    return triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), tokens


def specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    """All kernels with scale and residual, in bfloat16 and in both ways of float32, for whole tokens and for each width of a part.

    One size of tiles serves all other sizes.
    """
    if not shapes:
        return []
    widths = sorted({shape[2] // shape[4] for shape in shapes if len(shape) == 5 and shape[4] > 1})
    tensors = {"half": "*bf16", "tf32": "*fp32", "ieee": "*fp32"}
    return [one for width in (0, *widths) for mode, tensor in tensors.items() for one in _specs_of(mode, tensor, width)]


def _specs_of(mode: str, tensor: str, width: int) -> list[KernelSpec]:
    """For one way of forming products, and parts of ``width``, or whole tokens (0)."""
    up = {"X": tensor, "W": tensor, "SCALE": "*fp32", "HIDDEN": tensor} | integers("B D H x_t x_b x_p scale_t scale_b")
    hidden = {"DY": tensor, "X": tensor, "W": tensor, "V": tensor, "SCALE": "*fp32", "HIDDEN": tensor, "DPRODUCT": tensor}
    hidden |= {"DSCALE": "*fp32"} | integers("B T D H dy_t dy_b dy_p x_t x_b x_p scale_t scale_b")
    product = {"A": tensor, "W": tensor, "R": tensor, "C": tensor}
    product |= integers("M N K a_t a_m a_k a_p w_t w_k w_n w_p r_t r_m r_p c_t c_m c_p")
    ending = f"{mode}_w{width}" if width else mode
    tokens = {"GROUP": GROUP, "WIDTH": width}

    def multiply(name: str, **known: Any) -> KernelSpec:
        fixed = {"GROUP": GROUP, "A_WIDTH": 0, "W_WIDTH": 0, "C_WIDTH": 0} | known
        return spec(f"token_product_{name}_{ending}", token_product_kernel, product, PRODUCT[mode], mode, fixed)

    result = [
        spec(f"token_swiglu_up_{ending}", token_swiglu_up_kernel, up, (UP_PARTED if width else UP)[mode], mode, tokens),
        spec(f"token_swiglu_hidden_bwd_{ending}", token_swiglu_hidden_bwd_kernel, hidden, HIDDEN[mode], mode, tokens),
        multiply("down", a_k=1, w_n=1, C_WIDTH=width),
        multiply("dx", a_k=1, w_k=1, R=None, C_WIDTH=width),
    ]
    if not width:
        return [*result, multiply("dweight", a_m=1, w_n=1, R=None)]
    return [
        *result,
        multiply("dgate_up", a_m=1, w_n=1, R=None, A_WIDTH=width),
        multiply("ddown", a_m=1, w_n=1, R=None, W_WIDTH=width),
    ]
