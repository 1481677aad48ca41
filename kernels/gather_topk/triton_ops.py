# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The best items by sums of their codes' numbers in Triton: a list for each user and part of the catalogue, then the parts' lists in one.

A program scores a tile of items, and merges it into its list in registers (`kernels.running_topk`) only where the tile's
best is above the worst that is kept; only then is it asked what is excluded. No score leaves a program but those of lists. Programs of
the same part follow each other, so that the users read its codes from the cache. What comes back does not depend on how many parts
there are: keys are a total order.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import interpreting
from kernels.op import KernelSpec, Shape
from kernels.running_topk import NO_KEY, is_in, key_of, number_of, score_of, taken_in, warps_of

MAX_K = 1024
PROGRAMS = 528  # of the first kernel at least, where there are so many tiles: four for each multiprocessor of an H100
# Keys that a list has at least, and items that are looked at at once at least: the interpreter is the quicker the fewer they are.
_LEAST, _TILE = (2, 16) if interpreting() else (16, 256)


@triton.jit
def parts_kernel(
    VALUES, CODES, ROWS, OFFSETS, EXCLUDED, KEYS, items, part, codes,
    HAS_ROWS: tl.constexpr, HAS_EXCLUDED: tl.constexpr, SLOTS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """KEYS [B, parts, K]: the best of ``part`` of the ``items`` for one user, best first, then `NO_KEY`."""
    user = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * part
    end = tl.minimum(first + part, items)
    own = VALUES + user * SLOTS * codes
    best = tl.full((K,), NO_KEY, tl.int64)
    for start in range(first, end, BLOCK):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
        there = row < end
        if HAS_ROWS:
            row = tl.load(ROWS + row, mask=there, other=0)
        score = tl.zeros((BLOCK,), tl.float32)
        for slot in range(SLOTS):
            code = tl.load(CODES + row * SLOTS + slot, mask=there, other=0).to(tl.int64)
            score += tl.load(own + slot * codes + code, mask=there, other=float("-inf")).to(tl.float32)
        keys = tl.where(there & (score > float("-inf")), key_of(score, row), NO_KEY)
        if tl.max(keys) > tl.min(best):
            if HAS_EXCLUDED:
                keys = tl.where(is_in(EXCLUDED, tl.load(OFFSETS + user), tl.load(OFFSETS + user + 1), row), NO_KEY, keys)
            best = taken_in(best, keys, K, BLOCK)
    tl.store(KEYS + (user * tl.num_programs(1) + tl.program_id(1)) * K + tl.arange(0, K), best)


@triton.jit
def lists_kernel(KEYS, OUT_ROWS, OUT_SCORES, count, k, K: tl.constexpr, BLOCK: tl.constexpr):
    """The k best of the ``count`` keys of one user: rows and scores."""
    user = tl.program_id(0).to(tl.int64)
    best = tl.full((K,), NO_KEY, tl.int64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        keys = tl.load(KEYS + user * count + at, mask=at < count, other=NO_KEY)
        if tl.max(keys) > tl.min(best):
            best = taken_in(best, keys, K, BLOCK)
    slots = tl.arange(0, K)
    tl.store(OUT_ROWS + user * k + slots, tl.where(best == NO_KEY, -1, number_of(best)), mask=slots < k)
    tl.store(OUT_SCORES + user * k + slots, score_of(best).to(OUT_SCORES.dtype.element_ty), mask=slots < k)


def supports(values_bkv: Tensor, k: int) -> bool:
    """Whether a list fits a program's registers."""
    return k <= MAX_K and values_bkv.dtype in (torch.float32, torch.bfloat16, torch.float16)


def forward(
    values_bkv: Tensor, codes_nk: Tensor, rows: Tensor | None, excluded_offsets: Tensor | None, excluded: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """As `kernels.gather_topk.cpu.forward`; codes and rows are not looked through, which would wait for the GPU."""
    users, slots, codes = values_bkv.shape
    values, table = values_bkv.contiguous(), codes_nk.contiguous()
    items = len(codes_nk) if rows is None else len(rows)
    size = max(_LEAST, int(triton.next_power_of_2(k)))
    block = max(size, _TILE)
    tiles = triton.cdiv(items, block)
    part = block * max(1, triton.cdiv(tiles, max(1, triton.cdiv(PROGRAMS, max(1, users)))))
    parts = triton.cdiv(items, part)
    keys = table.new_empty(users, parts, size, dtype=torch.int64)
    found, scores = table.new_empty(users, k, dtype=torch.int64), values.new_empty(users, k)
    if users and parts:
        parts_kernel[(users, parts)](
            values, table, *(table if one is None else one.contiguous() for one in (rows, excluded_offsets, excluded)), keys, items, part,
            codes, HAS_ROWS=rows is not None, HAS_EXCLUDED=excluded is not None, SLOTS=slots, K=size, BLOCK=block,
            num_warps=warps_of(block),
        )  # fmt: skip
    if users:
        lists_kernel[(users,)](keys, found, scores, parts * size, k, K=size, BLOCK=block, num_warps=warps_of(block))
    return found, scores


def specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    """Both kernels for the lists and slots that ``shapes`` lead to, with values in float32 and bfloat16, and with all masks or none."""
    result: dict[str, KernelSpec] = {}
    for _, slots, _, _, k in shapes:
        size = max(_LEAST, int(triton.next_power_of_2(k)))
        fixed: dict[str, Any] = {"K": size, "BLOCK": max(size, _TILE)}
        for dtype, masked in (("fp32", True), ("bf16", False)):
            constants: dict[str, Any] = {"HAS_ROWS": masked, "HAS_EXCLUDED": masked, "SLOTS": slots} | fixed
            masks = dict.fromkeys(("ROWS", "OFFSETS", "EXCLUDED"), "*i64" if masked else "*i32")
            signature = {"VALUES": f"*{dtype}", "CODES": "*i32"} | masks
            signature |= {"KEYS": "*i64", "items": "i32", "part": "i32", "codes": "i32"} | dict.fromkeys(constants, "constexpr")
            name = f"gather_topk_parts_{dtype}_{slots}x{size}"
            result[name] = KernelSpec(name, parts_kernel, signature, constants, warps_of(fixed["BLOCK"]))
        signature = {"KEYS": "*i64", "OUT_ROWS": "*i64", "OUT_SCORES": "*fp32", "count": "i32", "k": "i32"}
        name = f"gather_topk_lists_{size}"
        result[name] = KernelSpec(name, lists_kernel, signature | dict.fromkeys(fixed, "constexpr"), fixed, warps_of(fixed["BLOCK"]))
    return list(result.values())
