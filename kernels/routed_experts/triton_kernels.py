# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The kernels of routed experts: products over groups of unequal numbers of rows, the rows of one token and one expert each.

The pairs (row, choice) stand sorted by group, n of them with an expert; ``OFFSETS [T * E + 1]`` says where groups begin, ``ROWS [n]`` which
row of its token each pair is. Matrices over pairs lie together in memory. A program of a product has BLOCK_M pairs of one group, which
``TILES [programs, 2]`` names with the first of the pairs, or -1 for a program too many. Weights are ``[T, E, rows, columns]`` with strides
for all but the columns; SCALE and BIAS are ``[T, E, columns]``, together. A SCALE goes with weights of a byte, which are widened in
registers: int8, or with FP8 the bytes of float8 (e4m3).
"""

import triton
import triton.language as tl

from kernels.tiles import dot


@triton.jit
def _digits(w, FP8: tl.constexpr):
    """Loaded weights as a product takes them. The bits of a float8, put in their places of a float16, are 2⁻⁸ of it, the tiny ones too."""
    if FP8:
        w = ((w.to(tl.int16) << 7) & -16385).to(tl.float16, bitcast=True)  # the sign twice, of which the second is cleared
    return w


@triton.jit
def _scales(SCALE, cols, in_cols, FP8: tl.constexpr):
    """The scales of columns, ``[1, N]``, for products of `_digits`."""
    scale = tl.load(SCALE + cols, mask=in_cols, other=0.0)[None, :]
    return scale * 256 if FP8 else scale


@triton.jit
def _inner(
    X, W, SCALE, BIAS, x_at, in_rows, col, D, H, w_d,
    FP8: tl.constexpr, SWIGLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gate's and the up matrix's columns of a tile, in one pass over the rows of X that begin at ``x_at [BLOCK_M]``.

    Without SWIGLU the first is the inner layer, and the second nothing.
    """
    cols, depth = col + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_cols = cols < H
    x_at = x_at[:, None] + depth[None, :]
    w_at = depth[:, None] * w_d + cols[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        in_depth = depth < D - start
        mask = in_depth[:, None] & in_cols[None, :]
        x = tl.load(X + x_at, mask=in_rows[:, None] & in_depth[None, :], other=0.0)
        gate = dot(x, _digits(tl.load(W + w_at, mask=mask, other=0), FP8), gate, WIDE, PRECISION)
        if SWIGLU:
            up = dot(x, _digits(tl.load(W + H + w_at, mask=mask, other=0), FP8), up, WIDE, PRECISION)
        X += BLOCK_K
        W += BLOCK_K * tl.cast(w_d, tl.int64)
    if SCALE is not None:
        gate *= _scales(SCALE, cols, in_cols, FP8)
        if SWIGLU:
            up *= _scales(SCALE + H, cols, in_cols, FP8)
    if BIAS is not None:
        gate += tl.load(BIAS + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
        if SWIGLU:
            up += tl.load(BIAS + H + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    return gate, up


@triton.jit
def _gelu_parts(inner):
    """The normal distribution function at ``inner``, and its density."""
    return 0.5 + 0.5 * tl.erf(inner * 0.7071067811865476), 0.3989422804014327 * tl.exp(-0.5 * inner * inner)


@triton.jit
def routed_up_kernel(
    X, ROWS, GATES, W, SCALE, BIAS, OFFSETS, TILES, HIDDEN, E, D, H, x_t, x_b, w_t, w_e, w_d,
    FP8: tl.constexpr, SWIGLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gate · act(x W + b) of BLOCK_M pairs and BLOCK_N hidden columns, in HIDDEN [n, H]; X [T, B, D], GATES [n]."""
    group = tl.load(TILES + 2 * tl.program_id(0)).to(tl.int64)
    if group < 0:
        return
    token, expert, col = group // E, group % E, tl.program_id(1) * BLOCK_N
    first, place = tl.load(TILES + 2 * tl.program_id(0) + 1).to(tl.int64), tl.arange(0, BLOCK_M)
    in_rows = place < tl.load(OFFSETS + group + 1) - first
    rows = tl.load(ROWS + first + place, mask=in_rows, other=0)
    F = 2 * H if SWIGLU else H
    if SCALE is not None:
        SCALE += group * F
    if BIAS is not None:
        BIAS += group * F
    gate, up = _inner(
        X + token * x_t, W + token * w_t + expert * w_e, SCALE, BIAS, rows * x_b, in_rows, col, D, H, w_d,
        FP8, SWIGLU, BLOCK_M, BLOCK_N, BLOCK_K, WIDE, PRECISION,
    )  # fmt: skip
    if SWIGLU:
        hidden = gate * tl.sigmoid(gate) * up
    else:
        below, _ = _gelu_parts(gate)
        hidden = gate * below
    hidden *= tl.load(GATES + first + place, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    cols = col + tl.arange(0, BLOCK_N)
    at = place[:, None] * H + cols[None, :]
    tl.store(HIDDEN + first * H + at, hidden.to(HIDDEN.dtype.element_ty), mask=in_rows[:, None] & (cols < H)[None, :])


@triton.jit
def routed_hidden_bwd_kernel(
    DY, X, ROWS, GATES, W, V, BIAS, OFFSETS, TILES, HIDDEN, DINNER, DGATES, N, E, D, H,
    dy_t, dy_b, x_t, x_b, w_t, w_e, w_d, v_t, v_e, v_h,
    SWIGLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For BLOCK_M pairs and BLOCK_N hidden columns, with W for weight_in [T, E, D, F] and V for weight_out [T, E, H, D].

    Writes gate · act again, in HIDDEN [n, H]; the gradient of the inner layer in DINNER [n, F]; and the columns' share of the gates'
    gradient in DGATES [column tiles, N] float32, N being the pairs with and without an expert.
    """
    group = tl.load(TILES + 2 * tl.program_id(0)).to(tl.int64)
    if group < 0:
        return
    token, expert, col = group // E, group % E, tl.program_id(1) * BLOCK_N
    first, place = tl.load(TILES + 2 * tl.program_id(0) + 1).to(tl.int64), tl.arange(0, BLOCK_M)
    in_rows = place < tl.load(OFFSETS + group + 1) - first
    rows = tl.load(ROWS + first + place, mask=in_rows, other=0)
    F = 2 * H if SWIGLU else H
    if BIAS is not None:
        BIAS += group * F
    gate, up = _inner(
        X + token * x_t, W + token * w_t + expert * w_e, None, BIAS, rows * x_b, in_rows, col, D, H, w_d,
        False, SWIGLU, BLOCK_M, BLOCK_N, BLOCK_K, WIDE, PRECISION,
    )  # fmt: skip
    cols, depth = col + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_cols = cols < H
    DY += token * dy_t
    V += token * v_t + expert * v_e + col.to(tl.int64) * v_h
    dy_at = (rows * dy_b)[:, None] + depth[None, :]
    v_at = depth[:, None] + tl.arange(0, BLOCK_N)[None, :] * v_h
    dhidden = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        in_depth = depth < D - start
        dy = tl.load(DY + dy_at, mask=in_rows[:, None] & in_depth[None, :], other=0.0)
        v = tl.load(V + v_at, mask=in_depth[:, None] & in_cols[None, :], other=0.0)
        dhidden = dot(dy, v, dhidden, WIDE, PRECISION)
        DY += BLOCK_K
        V += BLOCK_K
    mask = in_rows[:, None] & in_cols[None, :]
    at = place[:, None] * H + cols[None, :]
    weight = tl.load(GATES + first + place, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    if SWIGLU:
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        hidden = silu * up
        slope = up * (sigmoid + silu * (1 - sigmoid))
    else:
        below, density = _gelu_parts(gate)
        hidden = gate * below
        slope = below + gate * density
    tl.store(DGATES + tl.program_id(1).to(tl.int64) * N + first + place, tl.sum(dhidden * hidden, axis=1), mask=in_rows)
    tl.store(HIDDEN + first * H + at, (hidden * weight).to(HIDDEN.dtype.element_ty), mask=mask)
    dhidden *= weight
    DINNER += first * F
    if SWIGLU:
        at += place[:, None] * H
        tl.store(DINNER + H + at, (dhidden * silu).to(DINNER.dtype.element_ty), mask=mask)
    tl.store(DINNER + at, (dhidden * slope).to(DINNER.dtype.element_ty), mask=mask)


@triton.jit
def routed_product_kernel(
    A, W, SCALE, OFFSETS, TILES, C, E, N, K, w_t, w_e, w_k, w_n,
    FP8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``C = A @ W`` of BLOCK_M pairs and BLOCK_N columns: A [n, K], W [T, E, K, N] of any strides, C [n, N]."""
    group = tl.load(TILES + 2 * tl.program_id(0)).to(tl.int64)
    if group < 0:
        return
    first, place = tl.load(TILES + 2 * tl.program_id(0) + 1).to(tl.int64), tl.arange(0, BLOCK_M)
    in_rows = place < tl.load(OFFSETS + group + 1) - first
    cols, depth = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_cols = cols < N
    a_rows = A + (first + place) * K
    w_rows = W + group // E * w_t + group % E * w_e + depth.to(tl.int64) * w_k
    w_at = cols.to(tl.int64) * w_n
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        in_depth = depth < K - start
        a = tl.load(a_rows[:, None] + depth[None, :], mask=in_rows[:, None] & in_depth[None, :], other=0.0)
        w = tl.load(w_rows[:, None] + w_at[None, :], mask=in_depth[:, None] & in_cols[None, :], other=0)
        total = dot(a, _digits(w, FP8), total, WIDE, PRECISION)
        a_rows += BLOCK_K
        w_rows += BLOCK_K * tl.cast(w_k, tl.int64)
    if SCALE is not None:
        total *= _scales(SCALE + group * N, cols, in_cols, FP8)
    at = place[:, None] * N + cols[None, :]
    tl.store(C + first * N + at, total.to(C.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])


@triton.jit
def routed_combine_kernel(PARTS, PLACES, ONTO, Y, M, D, choices, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``Y = ONTO + Σ_j PARTS[PLACES[:, j]]`` in this order: PARTS [n, D], PLACES [M, choices], negative for none, ONTO (or None) [M, D]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < D)[None, :]
    at = rows[:, None] * D + cols[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if ONTO is not None:
        total = tl.load(ONTO + at, mask=mask, other=0.0).to(tl.float32)
    for choice in range(0, choices):
        places = tl.load(PLACES + rows * choices + choice, mask=rows < M, other=-1).to(tl.int64)
        total += tl.load(PARTS + places[:, None] * D + cols[None, :], mask=mask & (places >= 0)[:, None], other=0.0).to(tl.float32)
    tl.store(Y + at, total.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def routed_weight_grad_kernel(
    A, B, ROWS, OFFSETS, C, SUMS, E, M, N, r_t, r_b,
    GATHER_A: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``C[g] = A[g]ᵀ @ B[g]`` over the pairs of a group, BLOCK_K at a time, and the sums of B's columns in SUMS [T * E, N], or None.

    One of the two is [T, B, ·] with strides r_t and r_b, whose rows are gathered: A with GATHER_A, else B. The other has a row for each
    pair. C is [T * E, M, N]; a group without pairs gets zeros.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    within = tl.program_id(0) % (tiles_m * tiles_n)
    row, col = within // tiles_n * BLOCK_M, within % tiles_n * BLOCK_N
    rows, cols, depth = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    begin = tl.load(OFFSETS + group)
    end = tl.load(OFFSETS + group + 1)
    gathered = group // E * r_t
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(begin, end, BLOCK_K):
        pairs = (start + depth).to(tl.int64)
        in_depth = pairs < end
        source = gathered + tl.load(ROWS + pairs, mask=in_depth, other=0).to(tl.int64) * r_b
        if GATHER_A:
            a_at, b_at = source, pairs * N
        else:
            a_at, b_at = pairs * M, source
        a = tl.load((A + a_at)[None, :] + rows[:, None], mask=in_depth[None, :] & (rows < M)[:, None], other=0.0)
        b = tl.load((B + b_at)[:, None] + cols[None, :], mask=in_depth[:, None] & (cols < N)[None, :], other=0.0)
        total = dot(a, b, total, WIDE, PRECISION)
        if SUMS is not None:
            sums += tl.sum(b.to(tl.float32), axis=0)
    at = (group * M + rows[:, None]) * N + cols[None, :]
    tl.store(C + at, total.to(C.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])
    if SUMS is not None:
        tl.store(SUMS + group * N + cols, sums.to(SUMS.dtype.element_ty), mask=(cols < N) & (row == 0))
