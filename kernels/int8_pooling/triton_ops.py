# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Int8 pooling in Triton: a program reads the rows of one bag, some at a time, and writes their sum once; no float table exists."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.int8_pooling.reference import HEADER
from kernels.op import KernelSpec, Shape

_WIDEST = 256  # columns of one program
_TILE = 1024  # numbers that one program reads at a time


@triton.jit
def _half(ROWS, first, mask):
    """The float16 at a byte address, widened; a row of odd width puts it at an odd one, which no load of two bytes takes."""
    low = tl.load(ROWS + first, mask=mask, other=0).to(tl.uint16)
    high = tl.load(ROWS + first + 1, mask=mask, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def int8_pooling_kernel(ROWS, VALUES, OFFSETS, Y, D, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """Y [B, D] for BLOCK_D columns of one bag, BLOCK_L of its rows at a time."""
    bag = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(OFFSETS + bag)
    end = tl.load(OFFSETS + bag + 1)
    sums = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_L):
        places = start + tl.arange(0, BLOCK_L)
        there = places < end
        first = tl.load(VALUES + places, mask=there, other=0) * (D + 4)
        scale = _half(ROWS, first, there)[:, None]
        offset = _half(ROWS, first + 2, there)[:, None]
        mask = there[:, None] & (cols < D)[None, :]
        q = tl.load(ROWS + first[:, None] + 4 + cols[None, :], mask=mask, other=0).to(tl.float32)
        sums += q * scale + offset
    tl.store(Y + bag * D + cols, tl.sum(sums, axis=0).to(Y.dtype.element_ty), mask=cols < D)


def supports(_: Tensor) -> bool:
    """Every table of int8 rows."""
    return True


def forward(rows: Tensor, values: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, D]`` of ``rows [R, 4 + D]``; all inputs contiguous. Values and offsets are not looked through, which would wait for the GPU."""
    bags, width = len(offsets) - 1, rows.shape[1] - HEADER
    y = torch.empty(bags, width, dtype=dtype, device=rows.device)
    if bags:
        block_l, block_d = _blocks(width)
        int8_pooling_kernel[(bags, triton.cdiv(width, block_d))](
            rows, values, offsets, y, width, BLOCK_L=block_l, BLOCK_D=block_d
        )  # fmt: skip
    return y


def specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    """The kernel for the blocks that ``shapes`` lead to, with results in float32 and bfloat16."""
    result = []
    for block_l, block_d in sorted({_blocks(width) for _, width, *_ in shapes}):
        for dtype in ("fp32", "bf16"):
            constants: dict[str, Any] = {"BLOCK_L": block_l, "BLOCK_D": block_d}
            signature = {"ROWS": "*u8", "VALUES": "*i64", "OFFSETS": "*i64", "Y": f"*{dtype}", "D": "i32"}
            signature |= dict.fromkeys(constants, "constexpr")
            result.append(KernelSpec(f"int8_pooling_{dtype}_{block_l}x{block_d}", int8_pooling_kernel, signature, constants))
    return result


def _blocks(width: int) -> tuple[int, int]:
    """Rows and columns that a program reads at a time."""
    block_d = min(_WIDEST, max(16, triton.next_power_of_2(width)))
    return min(32, _TILE // block_d), block_d
