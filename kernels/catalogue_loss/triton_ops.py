# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The log-partition over a catalogue in Triton: logits live in registers only, and are formed again for each gradient.

Source of the scheme: FlashAttention-2 (Dao, arXiv 2307.08691), with items for keys and without values; cross-entropies of the same kind
are Cut Your Losses' (Wijmans et al., arXiv 2411.09009). The forward pass keeps two numbers for each state. The gradients of the states and
of the items are the same sum, over the other side's vectors, and so the same kernel: only whether a state is a row or a column differs.

Few states alone would not fill a GPU. So the catalogue is divided into parts of `PART` items or more, whose results are put together
outside: no atomics, and a state's result does not depend on which states come with it. Few items are helped likewise, by parts of the
states.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels.backend import interpreting
from kernels.op import KernelSpec, Shape
from kernels.tiles import dot, integers, mode_of, precision_of

PART = 2048  # items at least that a program goes through
MAX_PARTS = 32  # of the catalogue
PROGRAMS = 256  # that the gradient of few items is divided among
_LIFT = 2.0**14  # keeps probabilities within float16's range, whose smallest number is 2^-24


class Tile(NamedTuple):
    """Rows and columns of a tile of logits, the most of a vector that is multiplied and that is summed at a time, warps and stages."""

    m: int
    n: int
    k: int
    e: int
    warps: int
    stages: int


# By how products are formed: of two-byte elements, of float32 as TF32, of float32 as they are.
# The largest tried that do not spill in `kernels.aot`.
FORWARD = {"half": Tile(128, 128, 64, 0, 8, 3), "tf32": Tile(128, 64, 32, 0, 8, 3), "ieee": Tile(64, 64, 32, 0, 8, 3)}
GRADIENT = {"half": Tile(128, 64, 64, 128, 8, 3), "tf32": Tile(64, 64, 32, 128, 8, 3), "ieee": Tile(64, 64, 32, 128, 8, 3)}
_WIDE_HALF = Tile(64, 64, 64, 256, 8, 3)  # beyond 128: one sum of all columns spares forming the logits anew for each slice of them


@triton.jit
def _vectors(X, rows, in_rows, x_r, first, D: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK]: elements of vectors from ``first`` on, zeros beyond. Vectors start at multiples of 16 bytes; see `_aligned`."""
    cols = first + tl.arange(0, BLOCK)
    at = X + rows[:, None] * x_r + cols[None, :]
    at = tl.multiple_of(tl.max_contiguous(at, [1, 16]), [1, 16])
    mask = in_rows[:, None] if D % BLOCK == 0 else in_rows[:, None] & (cols < D)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _logits(
    X, Y, rows, cols, in_rows, in_cols, x_r, y_r, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: inner products."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, D, BLOCK_K):
        x = _vectors(X, rows, in_rows, x_r, first, D, BLOCK_K)
        y = _vectors(Y, cols, in_cols, y_r, first, D, BLOCK_K)
        total = dot(x, tl.trans(y), total, WIDE, PRECISION)
    return total


@triton.jit
def statistics_kernel(
    X, Y, TOPS, TOTALS, S, C, span, x_s, x_n, y_c, y_n, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest logit and the sum below it of BLOCK_M states over a part of ``span`` items, in TOPS and TOTALS [parts, n, S]."""
    part, slot = tl.program_id(1), tl.program_id(2)
    row, begin = tl.program_id(0).to(tl.int64) * BLOCK_M, part * span
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_rows = rows < S - row
    X += row * x_s + slot.to(tl.int64) * x_n
    Y += begin.to(tl.int64) * y_c + slot.to(tl.int64) * y_n
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, tl.minimum(begin + span, C), BLOCK_N):
        in_cols = cols < C - start
        logits = _logits(X, Y, rows, cols, in_rows, in_cols, x_s, y_c, D, BLOCK_M, BLOCK_N, BLOCK_K, WIDE, PRECISION)
        logits = tl.where(in_cols[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
        Y += BLOCK_N * tl.cast(y_c, tl.int64)
    at = (part * tl.num_programs(2) + slot).to(tl.int64) * S + row + rows
    tl.store(TOPS + at, top, mask=in_rows)
    tl.store(TOTALS + at, total, mask=in_rows)


@triton.jit
def gradient_kernel(
    X, Y, TOPS, SHARES, SCALES, OUT, M, N, S, span, x_m, x_n, y_m, y_n, scale_n, scale_m, D: tl.constexpr, STATES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``OUT [parts, M, n, D] = scale_m Σ_n share · exp(logit_mn − top) · Y_n`` over a part of ``span`` of the N vectors in Y.

    TOPS and SHARES [n, S] are the states', which are the rows, of M, where STATES is set, and the columns else. SCALES are read at
    ``slot * scale_n + row * scale_m``.
    """
    slices: tl.constexpr = (D + BLOCK_E - 1) // BLOCK_E
    part, slot, first = tl.program_id(1), tl.program_id(2) // slices, tl.program_id(2) % slices * BLOCK_E
    row, begin = tl.program_id(0).to(tl.int64) * BLOCK_M, part * span
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_rows = rows < M - row
    X += row * x_m + slot.to(tl.int64) * x_n
    Y += begin.to(tl.int64) * y_m + slot.to(tl.int64) * y_n
    TOPS += slot.to(tl.int64) * S
    SHARES += slot.to(tl.int64) * S
    if STATES:
        top = tl.load(TOPS + row + rows, mask=in_rows, other=0.0)[:, None]
        weight = tl.load(SHARES + row + rows, mask=in_rows, other=0.0)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in range(begin, tl.minimum(begin + span, N), BLOCK_N):
        in_cols = cols < N - start
        logits = _logits(X, Y, rows, cols, in_rows, in_cols, x_m, y_m, D, BLOCK_M, BLOCK_N, BLOCK_K, WIDE, PRECISION)
        if not STATES:
            top = tl.load(TOPS + start + cols, mask=in_cols, other=0.0)[None, :]
            weight = tl.load(SHARES + start + cols, mask=in_cols, other=0.0)[None, :]
        weights = tl.where(in_cols[None, :], tl.exp(logits - top) * weight, 0.0)
        y = _vectors(Y, cols, in_cols, y_m, first, D, BLOCK_E)
        total = dot(weights.to(y.dtype), y, total, WIDE, PRECISION)
        Y += BLOCK_N * tl.cast(y_m, tl.int64)
    scale = tl.load(SCALES + slot * tl.cast(scale_n, tl.int64) + (row + rows) * scale_m, mask=in_rows, other=0.0)[:, None]
    within = first + tl.arange(0, BLOCK_E)
    slots = tl.num_programs(2) // slices
    OUT += ((part.to(tl.int64) * M + row) * slots + slot) * D
    at = tl.multiple_of(tl.max_contiguous(OUT + rows[:, None] * slots * D + within[None, :], [1, 16]), [1, 16])
    tl.store(at, (total * scale).to(OUT.dtype.element_ty), mask=in_rows[:, None] & (within < D)[None, :])


def supports(states: Tensor) -> bool:
    """Whether the kernels take the dtype of ``states``. Any width fits: vectors are multiplied and summed a piece at a time."""
    return states.dtype in (torch.float32, torch.bfloat16, torch.float16)


def statistics_of(states: Tensor, items: Tensor) -> Tensor:
    """``[2, n, S]`` float32: each state's largest logit, and the sum of all exponentials of what they are below it."""
    (count, slots, _), candidates = states.shape, len(items)
    states, items = _aligned(states), _aligned(items)
    tile = FORWARD[mode_of(states)]
    parts, span = _parts(candidates, min(MAX_PARTS, candidates // PART), tile.n)
    tops, totals = (torch.empty(parts, slots, count, dtype=torch.float32, device=states.device) for _ in range(2))
    if tops.numel():
        statistics_kernel[triton.cdiv(count, tile.m), parts, slots](
            states, items, tops, totals, count, candidates, span, *states.stride()[:2], *items.stride()[:2], **_options(tile, states)
        )  # fmt: skip
    top = tops.amax(0)
    return torch.stack((top, (totals * (tops - top).exp()).sum(0)))


def backward(grad: Tensor, states: Tensor, items: Tensor, weights: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``states [S, n, d]`` and ``items [C, n, d]`` for ``grad [n]``.

    A probability is rounded to the dtype of the vectors before it is multiplied with them. Probabilities of a large catalogue and
    weights of a large batch are below what float16 can tell from zero, so they are lifted first, the weights to one at most.
    """
    width = states.shape[2]
    states, items = _aligned(states), _aligned(items)
    tops, totals = statistics
    coefficients = grad.float()[:, None] * weights.float()
    largest = coefficients.abs().amax(1, keepdim=True) if len(weights) else coefficients.new_ones(len(grad), 1)
    largest = largest.clamp_min(torch.finfo(torch.float32).tiny)
    lifted = _LIFT / totals
    parts = min(MAX_PARTS, len(items) // PART)
    dstates = _gradient(states, items, tops, lifted, coefficients / _LIFT, parts, True)
    tiles = triton.cdiv(len(items), _gradient_tile(mode_of(items), items.shape[2]).m) * items.shape[1]
    parts = min(PROGRAMS // max(tiles, 1), len(states) // 512)
    ditems = _gradient(items, states, tops, coefficients / largest * lifted, largest / _LIFT, parts, False)
    return dstates[..., :width].contiguous(), ditems[..., :width].contiguous()


def _gradient(own: Tensor, other: Tensor, tops: Tensor, shares: Tensor, scales: Tensor, parts: int, of_states: bool) -> Tensor:
    """The gradient of ``own [M, n, d]``; ``scales`` is ``[n, M]`` of the states and ``[n, 1]`` of the items."""
    count, slots, width = own.shape
    if not own.numel() or not len(other):
        return torch.zeros(own.shape, dtype=own.dtype, device=own.device)
    tile = _gradient_tile(mode_of(own), width)
    parts, span = _parts(len(other), parts, tile.n)
    out = torch.empty(parts, count, slots, width, dtype=own.dtype if parts == 1 else torch.float32, device=own.device)
    options = _options(tile, own)
    grid = (triton.cdiv(count, tile.m), parts, slots * triton.cdiv(width, options["BLOCK_E"]))
    gradient_kernel[grid](
        own, other, tops.contiguous(), shares.contiguous(), scales.contiguous(), out, count, len(other), tops.shape[1], span,
        *own.stride()[:2], *other.stride()[:2], scales.shape[1], int(of_states), STATES=of_states, **options
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0).to(own.dtype)


def _gradient_tile(mode: str, width: int) -> Tile:
    return _WIDE_HALF if mode == "half" and width > 128 else GRADIENT[mode]


def _parts(count: int, wanted: int, block: int) -> tuple[int, int]:
    """How many parts, none of them empty, and how much each has of ``count``: whole blocks."""
    span = triton.cdiv(triton.cdiv(count, max(wanted, 1)), block) * block
    return triton.cdiv(count, span), span


def _aligned(x: Tensor) -> Tensor:
    """``x [N, n, d]`` with vectors that start at multiples of 16 bytes and end at 16 elements: zeros add nothing to inner products."""
    missing = -x.shape[2] % 16
    if missing:
        return functional.pad(x, (0, missing))
    fits = x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:2])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _options(tile: Tile, x: Tensor) -> dict[str, Any]:
    return _constants(tile, mode_of(x), x.shape[-1], interpreting()) | {"num_warps": tile.warps, "num_stages": tile.stages}


def _constants(tile: Tile, mode: str, width: int, wide: bool) -> dict[str, Any]:
    power = max(32, triton.next_power_of_2(width))
    blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": min(power, tile.k)}
    if tile.e:
        blocks["BLOCK_E"] = min(power, tile.e)
    return {"D": width, **blocks, "WIDE": wide, "PRECISION": precision_of(mode)}


def specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    """The kernels for the widths that ``shapes`` lead to, in bfloat16 and in both ways of float32."""
    result = []
    for width in sorted({triton.cdiv(shape[3], 16) * 16 for shape in shapes}):
        for mode, tensor in (("half", "*bf16"), ("tf32", "*fp32"), ("ieee", "*fp32")):
            vectors = {"X": tensor, "Y": tensor, "TOPS": "*fp32"}
            forward = vectors | {"TOTALS": "*fp32"} | integers("S C span x_s x_n y_c y_n")
            gradient = vectors | {"SHARES": "*fp32", "SCALES": "*fp32"} | integers("M N S span x_m x_n y_m y_n scale_n scale_m")
            result.append(_spec(f"catalogue_statistics_{mode}_{width}", statistics_kernel, forward, FORWARD[mode], mode, width, {}))
            for of, out in (("states", "*fp32"), ("items", tensor)):  # those of the states are mostly summed over parts
                known = {"STATES": of == "states"} | ({"scale_m": 1} if of == "states" else {"scale_n": 1})
                name = f"catalogue_{of}_grad_{mode}_{width}"
                result.append(_spec(name, gradient_kernel, gradient | {"OUT": out}, _gradient_tile(mode, width), mode, width, known))
    return result


def _spec(name: str, kernel: Any, signature: dict[str, str], tile: Tile, mode: str, width: int, known: dict[str, int]) -> KernelSpec:
    """``known`` are arguments that Triton compiles in as constants."""
    constants = _constants(tile, mode, width, wide=False) | known
    signature = signature | dict.fromkeys(constants, "constexpr")
    return KernelSpec(name, kernel, signature, constants, tile.warps, tile.stages, (tile.m, tile.n, constants["BLOCK_K"]))
