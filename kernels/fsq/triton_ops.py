# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""FSQ in Triton: one read of z, one write of levels and codes; the backward pass reads z again and keeps nothing else.

Rounding is half to even, indices are sums of int64, the levels are divided exactly, and multiplications and additions are not fused: from
the same side of a tie the same bits come as on the CPU. The bound itself is off by a few units in the last place.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fsq.reference import box, numbering
from kernels.op import KernelSpec, Shape

MAX_DIGITS = 1024
ROUND = tl.constexpr(1.5 * 2**23)  # adding and subtracting it rounds a float32 below 2^22 to a whole number, half to even
_TILE = 1024  # numbers that one program holds


@triton.jit
def _small(x, TANH: tl.constexpr):
    """e, of which tanh and σ are made without overflow: e^−2|x| or e^−|x|."""
    return tl.exp(-2 * tl.abs(x)) if TANH else tl.exp(-tl.abs(x))


@triton.jit
def _curve(x, TANH: tl.constexpr):
    """tanh or σ."""
    small = _small(x, TANH)
    if TANH:
        ratio = tl.div_rn(1 - small, 1 + small)
        return tl.where(x < 0, -ratio, ratio)
    return tl.div_rn(tl.where(x < 0, small, 1.0), 1 + small)


@triton.jit
def fsq_fwd_kernel(Z, FACTORS, NUMBERS, Y, INDEX, M, D, TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Y [M, D] and INDEX [M] for BLOCK_M rows.

    FACTORS [4, D]: scale, offset and shift of the bound, and the unit of the levels; NUMBERS [2, D]: what makes the lowest level 0, basis.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    digit = cols < D
    mask = (rows < M)[:, None] & digit[None, :]
    at = rows[:, None] * D + cols[None, :]
    scale = tl.load(FACTORS + cols, mask=digit, other=0.0)[None, :]
    offset = tl.load(FACTORS + D + cols, mask=digit, other=0.0)[None, :]
    shift = tl.load(FACTORS + 2 * D + cols, mask=digit, other=0.0)[None, :]
    unit = tl.load(FACTORS + 3 * D + cols, mask=digit, other=1.0)[None, :]
    z = tl.load(Z + at, mask=mask, other=0.0).to(tl.float32)
    rounded = (_curve(z + shift, TANH) * scale - offset + ROUND) - ROUND
    y = tl.div_rn(rounded, tl.broadcast_to(unit, (BLOCK_M, BLOCK_D))) if TANH else rounded * unit - 1
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)
    lowest = tl.load(NUMBERS + cols, mask=digit, other=0)[None, :]
    basis = tl.load(NUMBERS + D + cols, mask=digit, other=0)[None, :]
    tl.store(INDEX + rows, tl.sum((rounded.to(tl.int64) + lowest) * basis, axis=1), mask=rows < M)


@triton.jit
def fsq_bwd_kernel(DY, Z, FACTORS, DZ, total, D, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """DZ for BLOCK of the ``total`` numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    cols = at % D
    scale = tl.load(FACTORS + cols, mask=mask, other=0.0)
    shift = tl.load(FACTORS + 2 * D + cols, mask=mask, other=0.0)
    unit = tl.load(FACTORS + 3 * D + cols, mask=mask, other=1.0)
    dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
    small = _small(tl.load(Z + at, mask=mask, other=0.0).to(tl.float32) + shift, TANH)
    slope = small / ((1 + small) * (1 + small))  # of σ; tanh's is four times as steep
    dz = dy / unit * scale * (4 * slope) if TANH else dy * unit * scale * slope
    tl.store(DZ + at, dz.to(DZ.dtype.element_ty), mask=mask)


def supports(z: Tensor) -> bool:
    """Whether the digits of ``z [M, K, d]`` fit one program, in a dtype that the kernels take."""
    return z.shape[-1] <= MAX_DIGITS and z.dtype in (torch.float32, torch.bfloat16, torch.float16)


def forward(z: Tensor, levels: Sequence[int], form: str) -> tuple[Tensor, Tensor]:
    """As `kernels.fsq.cpu.forward`; z contiguous."""
    digits = z.shape[-1]
    y = torch.empty_like(z)
    index = torch.zeros(z.shape[:-1], dtype=torch.int64, device=z.device)
    if m := index.numel():
        block_m, block_d = _blocks(digits)
        fsq_fwd_kernel[(triton.cdiv(m, block_m),)](
            z, *_tables(tuple(levels), form, z.device), y, index, m, digits,
            TANH=form == "tanh", BLOCK_M=block_m, BLOCK_D=block_d, enable_fp_fusion=False,
        )  # fmt: skip
    return y, index


def backward(dy: Tensor, z: Tensor, levels: Sequence[int], form: str) -> Tensor:
    """As `kernels.fsq.cpu.backward`; both contiguous."""
    dz = torch.empty_like(z)
    if total := z.numel():
        factors, _ = _tables(tuple(levels), form, z.device)
        fsq_bwd_kernel[(triton.cdiv(total, _TILE),)](
            dy, z, factors, dz, total, z.shape[-1], TANH=form == "tanh", BLOCK=_TILE, enable_fp_fusion=False
        )  # fmt: skip
    return dz


@lru_cache(maxsize=64)
def _tables(levels: tuple[int, ...], form: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """What `fsq_fwd_kernel` calls FACTORS and NUMBERS, computed as the reference computes them."""
    host = torch.device("cpu")
    counts, numbers = torch.tensor(levels), torch.stack(numbering(levels, form, host))
    if form == "tanh":
        factors = torch.stack((*box(levels, torch.float32, host), (counts // 2).float()))
    else:
        nothing = torch.zeros(len(levels))
        factors = torch.stack((counts.float() - 1, nothing, nothing, 2 / (counts - 1)))
    return factors.to(device), numbers.to(device)


def specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    """Both kernels for the numbers of digits and the forms that ``shapes`` lead to, in float32 and bfloat16."""
    result: dict[str, KernelSpec] = {}
    for digits, sigmoid in sorted({(len(levels), bool(sigmoid)) for _, _, sigmoid, *levels in shapes}):
        block_m, block_d = _blocks(digits)
        for dtype in ("fp32", "bf16"):
            tensor, form = f"*{dtype}", f"{'sigmoid' if sigmoid else 'tanh'}_{dtype}"
            constants: dict[str, Any] = {"TANH": not sigmoid, "BLOCK_M": block_m, "BLOCK_D": block_d}
            fwd = {"Z": tensor, "FACTORS": "*fp32", "NUMBERS": "*i64", "Y": tensor, "INDEX": "*i64", "M": "i32", "D": "i32"}
            bwd = {"DY": tensor, "Z": tensor, "FACTORS": "*fp32", "DZ": tensor, "total": "i32", "D": "i32"}
            fixed: dict[str, Any] = {"TANH": not sigmoid, "BLOCK": _TILE}
            for name, kernel, signature, known in (
                (f"fsq_fwd_{form}_{block_m}x{block_d}", fsq_fwd_kernel, fwd, constants),
                (f"fsq_bwd_{form}", fsq_bwd_kernel, bwd, fixed),
            ):
                result[name] = KernelSpec(name, kernel, signature | dict.fromkeys(known, "constexpr"), known)
    return list(result.values())


def _blocks(digits: int) -> tuple[int, int]:
    """Rows and columns of a block."""
    block_d = triton.next_power_of_2(digits)
    return _TILE // block_d, block_d
