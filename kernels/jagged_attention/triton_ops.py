# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Jagged attention in Triton, launched: which blocks there are, the kernels of `triton_kernels`, and the bias' gradient by distance.

Blocks of `BLOCK` positions start at each row's beginning. A row of n tokens has ceil(n / BLOCK) of them and a batch at most
S / BLOCK + B, which is how many programs start, so neither the host waits for the offsets nor does a long row cost the short ones
anything; the few programs too many end at once.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from kernels import backend
from kernels.jagged_attention.cpu import Rule
from kernels.jagged_attention.shape import Case
from kernels.jagged_attention.triton_kernels import bias_grad_kernel, forward_kernel, key_grad_kernel, query_grad_kernel
from kernels.op import KernelSpec, Shape

BLOCK = 64
MAX_WIDTH = {torch.float32: 32, torch.bfloat16: 128, torch.float16: 128}  # of a head, with which nothing spills
MAX_PROGRAMS = 256  # of the bias' gradient, which writes one block for each
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def supports(q: Tensor) -> bool:
    """Whether the heads of ``q [S, H, e]`` fit one block, in a dtype that the kernels take."""
    return q.shape[2] <= MAX_WIDTH.get(q.dtype, 0)


def forward(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """``[S, H, e]`` each (contiguous) → ``[S, H, e]``, and the log-sum-exp ``[H, S]`` of the scores, ``[0]`` for the SiLU form."""
    tokens, heads, _ = q.shape
    y = torch.empty_like(q)
    lse = torch.empty((heads, tokens) if rule.form == "softmax" else 0, dtype=torch.float32, device=q.device)
    if q.numel():
        tiles = _tiles(offsets, tokens)
        common, constants = _arguments(q, bias, rule)
        given = (*_aligned(q, k, v), _given(bias, q), offsets, *_prefixes(rule, offsets, tiles), tiles, y, lse)
        forward_kernel[len(tiles), heads](*given, *common, **constants, **_schedule("fwd", q.dtype))
    return y, lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bias: Tensor | None, y: Tensor | None, lse: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v ``[S, H, e]`` and of the bias ``[H or 1, D]`` (``[0]`` without one); all inputs contiguous."""
    tokens, heads, _ = q.shape
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    if not q.numel():
        return dq, dk, dv, q.new_zeros(0) if bias is None else torch.zeros_like(bias)
    tiles = _tiles(offsets, tokens)
    delta = torch.empty_like(lse)
    common, constants = _arguments(q, bias, rule)
    q, k, v, dy, y = _aligned(q, k, v, dy, _given(y, dy))
    given = (q, k, v, _given(bias, q), offsets, *_prefixes(rule, offsets, tiles), tiles, dy, lse, delta)
    query_grad_kernel[len(tiles), heads](*given, y, dq, *common, **constants, **_schedule("dq", q.dtype))
    key_grad_kernel[len(tiles), heads](*given, dk, dv, *common, **constants, **_schedule("dkv", q.dtype))
    if bias is None:
        return dq, dk, dv, q.new_zeros(0)
    last = _bands(bias.shape[1])
    shares = max(1, min(len(tiles), MAX_PROGRAMS // (heads * (last + 2))))
    sums = torch.empty(shares, last + 2, heads, BLOCK, BLOCK, dtype=torch.float32, device=q.device)
    grid = (shares, last + 2, heads)
    bias_grad_kernel[grid](*given, sums, len(tiles), last, *common, **constants, **_schedule("dbias", q.dtype))
    dbias = _by_distance(sums.sum(0), bias.shape[1])
    return dq, dk, dv, (dbias if len(bias) > 1 else dbias.sum(0, keepdim=True)).to(bias.dtype)


def _aligned(*tensors: Tensor) -> list[Tensor]:
    """The kernels read 16 bytes at once; a view into another tensor may start elsewhere."""
    return [x.clone() if x.data_ptr() % 16 else x for x in tensors]


def _given(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that is never read has to point somewhere."""
    return other if tensor is None else tensor


def _tiles(offsets: Tensor, tokens: int) -> Tensor:
    """int32 ``[S // BLOCK + B, 2]``: the row of each block, B for a block too many, and where in the row it starts."""
    rows = len(offsets) - 1
    counts = (offsets.diff() + BLOCK - 1) // BLOCK
    ends = counts.cumsum(0)
    tile = torch.arange(tokens // BLOCK + rows, device=offsets.device)
    row = torch.searchsorted(ends, tile, right=True)
    start = (tile - (ends - counts)[row.clamp(max=rows - 1)]) * BLOCK
    return torch.stack((row, start), 1).int()


def _prefixes(rule: Rule, offsets: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """int32 ``[S]`` and ``[B]``: how many of its row's first tokens each token sees, and any token of a row; ``other`` where none."""
    if rule.seen is None:
        return other, other
    row = torch.repeat_interleave(offsets.diff(), output_size=len(rule.seen))
    most = rule.seen.new_zeros(len(offsets) - 1).scatter_reduce_(0, row, rule.seen, "amax")
    return rule.seen.int(), most.int()


def _arguments(q: Tensor, bias: Tensor | None, rule: Rule) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What all kernels take after their tensors."""
    tokens, heads, width = q.shape
    distances, between = (0, 0) if bias is None else (bias.shape[1], bias.shape[1] if len(bias) > 1 else 0)
    numbers = (tokens, heads, rule.group, distances, between, 1 / math.sqrt(width), 1 / rule.divisor)
    constants = _constants(width, rule.form, rule.mask, bias is not None, q.dtype)
    return numbers, constants | {"WIDE": backend.interpreting()}


def _constants(width: int, form: str, mask: str, biased: bool, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "E": width,
        "BLOCK_E": max(32, triton.next_power_of_2(width)),
        "BLOCK": BLOCK,
        "SOFTMAX": form == "softmax",
        "PREFIX": mask == "prefix",
        "BIASED": biased,
        "PRECISION": "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32",
    }


def _schedule(kernel: str, dtype: torch.dtype) -> dict[str, int]:
    """Warps and pipeline stages with which nothing spills: those with most in registers get more warps, and the largest no pipeline."""
    wide = dtype == torch.float32 or kernel in ("dkv", "dbias")
    return {"num_warps": 8 if wide else 4, "num_stages": 1 if kernel == "dkv" else 2}


def _bands(distances: int) -> int:
    """From which difference between the blocks of a query and of a key on all distances take the bias' last number."""
    return -(-(distances + BLOCK - 2) // BLOCK)


def _by_distance(sums_chij: Tensor, distances: int) -> Tensor:
    """``[C, H, BLOCK, BLOCK]`` → ``[H, D]``: the sums over pairs i, j of positions with the same distance.

    Band 0 holds the pairs whose key stands in a later block than the query, band c those whose key stands c - 1 blocks before, the last
    band all from there on. Rows of the blocks are shifted against each other until equal distances stand in one column.
    """
    block = sums_chij.shape[3]
    shifted = functional.pad(sums_chij.flip(3), (0, block)).flatten(2)[..., :-block].unflatten(2, (block, 2 * block - 1))
    sums_hct = shifted.sum(2).transpose(0, 1)
    by_distance = sums_hct[:, 1:-1, block - 1 :].clone()
    by_distance[:, :-1, 1:] += sums_hct[:, 2:-1, : block - 1]
    by_distance = by_distance.flatten(1)
    by_distance[:, 0] += sums_hct[:, 0].sum(1) + sums_hct[:, 1, : block - 1].sum(1)
    found = functional.pad(by_distance, (0, max(0, distances - by_distance.shape[1])))
    return torch.cat((found[:, : distances - 1], found[:, distances - 1 :].sum(1, keepdim=True) + sums_hct[:, -1].sum(1, keepdim=True)), 1)


def specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    """The kernels for the widths, forms and masks that ``shapes`` lead to, in float32 and bfloat16."""
    wanted = {(case.width, case.form, case.mask, case.distances > 0) for case in (Case(*shape) for shape in shapes)}
    result = []
    for width, form, mask, biased in sorted({(w, f, "grouped" if m == "causal" else m, b) for w, f, m, b in wanted}):
        for dtype in (dtype for dtype in (torch.float32, torch.bfloat16) if width <= MAX_WIDTH[dtype]):
            constants = _constants(width, form, mask, biased, dtype) | {"WIDE": False}
            tensor = f"*{_TYPES[dtype]}"
            suffix = f"{form}_{mask}_{'bias_' if biased else ''}{_TYPES[dtype]}_{width}"
            numbers = dict.fromkeys(("S", "H", "group", "distances", "between"), "i32") | {"scale": "fp32", "inverse": "fp32"}
            tail = numbers | dict.fromkeys(constants, "constexpr")
            head = dict.fromkeys(("Q", "K", "V", "BIAS"), tensor) | {"OFFSETS": "*i64"} | dict.fromkeys(("SEEN", "MOST", "TILES"), "*i32")
            given = head | {"DY": tensor, "LSE": "*fp32", "DELTA": "*fp32"}
            signatures = [
                ("fwd", forward_kernel, head | {"Y": tensor, "LSE": "*fp32"} | tail),
                ("dq", query_grad_kernel, given | {"Y": tensor, "DQ": tensor} | tail),
                ("dkv", key_grad_kernel, given | {"DK": tensor, "DV": tensor} | tail),
            ]
            if biased:
                signatures.append(("dbias", bias_grad_kernel, given | {"SUMS": "*fp32", "tiles": "i32", "last": "i32"} | tail))
            tile = (BLOCK, BLOCK, constants["BLOCK_E"])
            result += [
                KernelSpec(f"jagged_attention_{name}_{suffix}", kernel, signature, constants, tile=tile, **_schedule(name, dtype))
                for name, kernel, signature in signatures
            ]
    return result
