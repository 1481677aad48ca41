# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Paged scores in Triton: a program loads some keys of one key head by their slots, once for all query heads that it serves.

There are too few queries for a tensor core, and nothing but the keys to read: products are formed as they come. Blocks of slots start at
each row's beginning; a batch has at most S / BLOCK + B of them, which is how many programs start, so that the host waits for no offset.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.op import KernelSpec, Shape

MAX_WIDTH = 512
_TILE = 2048  # elements of keys that one program holds


@triton.jit
def paged_scores_kernel(
    Q, PAGES, SLOTS, OFFSETS, TILES, Y, S, pages, H, shared, page_p, page_h, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Y [H, S] of BLOCK_N slots of one row for the ``shared`` query heads of one key head; TILES has row and first slot, S for none."""
    row = tl.load(TILES + 2 * tl.program_id(0))
    slot = tl.load(TILES + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK_N)
    end = tl.load(OFFSETS + row + 1)
    inside = slot < tl.minimum(end, S)
    place = tl.load(SLOTS + slot, mask=inside, other=-1).to(tl.int64)
    there = (place >= 0) & (place < pages)
    cols = tl.arange(0, BLOCK_E)
    head = tl.program_id(1).to(tl.int64)
    at = PAGES + head * page_h + place[:, None] * page_p + cols[None, :]
    keys = tl.load(at, mask=there[:, None] & (cols < E)[None, :], other=0.0).to(tl.float32)
    for member in range(0, shared):
        query_head = head * shared + member
        q = tl.load(Q + (row * H + query_head) * E + cols, mask=cols < E, other=0.0).to(tl.float32)
        scores = tl.where(there, tl.sum(keys * q[None, :], axis=1), float("-inf"))
        tl.store(Y + query_head * S + slot, scores.to(Y.dtype.element_ty), mask=inside)


def supports(q: Tensor, dtype: torch.dtype) -> bool:
    """Whether a key of ``q``'s width fits a program, in dtypes that the kernel takes."""
    taken = (torch.float32, torch.bfloat16, torch.float16)
    return q.shape[2] <= MAX_WIDTH and q.dtype in taken and dtype in taken


def forward(q: Tensor, pages: Tensor, slots: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """``[H, S]``; q, slots and offsets contiguous. Slots and offsets are not looked through: one beyond the pool scores -∞."""
    (rows, heads, width), key_heads = q.shape, pages.shape[1]
    y = torch.empty(heads, len(slots), dtype=dtype, device=q.device)
    if not y.numel() or not rows:
        return y
    pages = pages if pages.stride(2) == 1 else pages.contiguous()
    block_e, block_n = _blocks(width)
    tiles = _tiles(offsets, len(slots), block_n)
    paged_scores_kernel[len(tiles), key_heads](
        q, pages, slots, offsets, tiles, y, len(slots), len(pages), heads, heads // key_heads, *pages.stride()[:2],
        E=width, BLOCK_E=block_e, BLOCK_N=block_n,
    )  # fmt: skip
    return y


def _tiles(offsets: Tensor, slots: int, block: int) -> Tensor:
    """int64 ``[S // block + B, 2]``: the row of each block and its first slot; the last row and S for a block too many."""
    rows = len(offsets) - 1
    counts = (offsets.diff() + block - 1) // block
    ends = counts.cumsum(0)
    tile = torch.arange(slots // block + rows, device=offsets.device)
    row = torch.searchsorted(ends, tile, right=True)
    there, row = row < rows, row.clamp(max=rows - 1)
    return torch.stack((row, torch.where(there, offsets[row] + (tile - (ends - counts)[row]) * block, slots)), 1)


def _blocks(width: int) -> tuple[int, int]:
    """Columns and keys that a program holds."""
    block_e = max(16, int(triton.next_power_of_2(width)))
    return block_e, min(128, _TILE // block_e)


def specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    """The kernel for the widths that ``shapes`` lead to, of keys in float32 and bfloat16."""
    result = []
    for width in sorted({shape[2] for shape in shapes}):
        for dtype in ("fp32", "bf16"):
            block_e, block_n = _blocks(width)
            constants: dict[str, Any] = {"E": width, "BLOCK_E": block_e, "BLOCK_N": block_n}
            signature = {"Q": f"*{dtype}", "PAGES": f"*{dtype}", "SLOTS": "*i64", "OFFSETS": "*i64", "TILES": "*i64", "Y": "*fp32"}
            signature |= dict.fromkeys(("S", "pages", "H", "shared", "page_p", "page_h"), "i32") | dict.fromkeys(constants, "constexpr")
            result.append(KernelSpec(f"paged_scores_{dtype}_{width}", paged_scores_kernel, signature, constants))
    return result
