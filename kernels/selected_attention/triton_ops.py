# SPDX-License-Identifier: Apache-2.0
"""Selected attention in Triton, launched: the tiles, the split over keys, and the order in which gradients of keys are summed.

**Few queries** (a unit of at most 16, as while decoding) leave a GPU empty if a unit is one program. So the choice is cut into shares of
`SPAN` entries, one program each, and a second kernel combines them. How many shares there are depends on no other row of the batch.

**Gradients of keys.** A key may be chosen by several blocks. `slot_grad_kernel` writes one float32 row for each entry of the choice, a
stable sort of the places tells their order, and `key_sum_kernel` sums those of each key: the same bits every time, for 4 (e + e_v) bytes
for each entry and key head meanwhile. No product is formed that is not needed; walking over tiles of keys with the queries of all blocks
that choose one of them would form up to N / K times as many.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels import backend
from kernels.op import KernelSpec, Shape
from kernels.selected_attention.shape import Case, Layout
from kernels.selected_attention.triton_kernels import combine_kernel, forward_kernel, key_sum_kernel, query_grad_kernel, slot_grad_kernel

FEW = 16  # rows of a tile for units of few queries: the least that a tensor core takes
SPAN = 256  # entries of a share
MAX_WIDTH = {torch.float32: 128, torch.bfloat16: 128, torch.float16: 128}  # of a head, with which nothing spills
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_SUMMED = 1024  # elements of a tile of `key_sum_kernel`
_COMBINED = 4  # queries of a program of `combine_kernel`


class Tile(NamedTuple):
    """Queries and entries of a program's tile, its warps and the stages of its pipeline."""

    m: int
    n: int
    warps: int
    stages: int


def supports(q: Tensor, v: Tensor) -> bool:
    """Whether the heads of ``q`` and ``v`` fit one block, in a dtype that the kernels take."""
    return max(q.shape[3], v.shape[3]) <= MAX_WIDTH.get(q.dtype, 0)


def forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, last: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """``[B, H, T, e_v]``, and the log-sum-exp ``[B, H, T]`` of the scores, +∞ for a query that reads nothing."""
    layout, kept, total = Layout.of(q, k, index), index.shape[3], q.shape[:3].numel()
    y = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not kept or not k.shape[2] or not total:
        return y.zero_(), lse.fill_(torch.inf)
    few = layout.rows <= FEW
    shares = triton.cdiv(kept, SPAN) if few else 1
    shared, shared_lse = (y, lse) if shares == 1 else (lse.new_empty(shares, *y.shape), lse.new_empty(shares, *lse.shape))
    given, numbers, constants = _arguments(q, k, v, index, valid, last, scale, layout)
    tile = _tile("fwd", layout, q, v)
    grid = layout.batch * layout.key_heads * layout.units * triton.cdiv(layout.rows, tile.m), shares
    forward_kernel[grid](*given, shared, shared_lse, SPAN if few else kept, total, *numbers, **constants, **_options(tile))
    if shares > 1:
        widths = {"EV": v.shape[3], "BLOCK_EV": _block(v.shape[3]), "BLOCK_M": _COMBINED}
        combine_kernel[triton.cdiv(total, _COMBINED),](shared, shared_lse, y, lse, shares, total, **widths)
    return y, lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, last: Tensor | None, y: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    layout, kept = Layout.of(q, k, index), index.shape[3]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not kept or not k.shape[2] or not q.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    given, numbers, constants = _arguments(q, k, v, index, valid, last, scale, layout)
    pairs, delta = layout.batch * layout.key_heads, torch.empty_like(lse)
    dy, y = _aligned(dy.contiguous(), y)
    tile = _tile("dq", layout, q, v)
    grid = (pairs * layout.units * triton.cdiv(layout.rows, tile.m),)
    query_grad_kernel[grid](*given, dy, lse, delta, y, dq, *numbers, **constants, **_options(tile))
    slots = [torch.empty(pairs, layout.units * kept, x.shape[3], dtype=torch.float32, device=q.device) for x in (k, v)]
    tile = _tile("slots", layout, q, v)
    grid = (pairs * layout.units * triton.cdiv(kept, tile.n),)
    slot_grad_kernel[grid](*given, dy, lse, delta, *slots, *numbers, **constants, **_options(tile))
    order, starts = _by_key(index, valid, layout, k.shape[2])
    for of_slots, found in zip(slots, (dk, dv), strict=True):
        _sum_by_key(of_slots, order, starts, found)
    return dq, dk, dv


def _by_key(index: Tensor, valid: Tensor, layout: Layout, keys: int) -> tuple[Tensor, Tensor]:
    """int64 ``[B, G', P K]``, entries in ascending order of the keys that they name, and ``[B, G', N + 1]``, where each key's begin."""
    groups = layout.key_heads if layout.own else layout.groups
    places = index.long().view(layout.batch, groups, -1)
    counts = valid.view(places.shape) & (places >= 0) & (places < keys)
    named, order = torch.sort(places.masked_fill(~counts, keys), dim=-1, stable=True)
    every = torch.arange(keys + 1, device=index.device).expand(*named.shape[:2], -1).contiguous()
    return order, torch.searchsorted(named, every)


def _sum_by_key(slots: Tensor, order: Tensor, starts: Tensor, out: Tensor) -> None:
    """Fill ``out [B, H_kv, N, e]``."""
    batch, key_heads, keys, width = out.shape
    block_e = _block(width)
    block_n = _SUMMED // block_e
    key_sum_kernel[batch * key_heads * triton.cdiv(keys, block_n),](
        slots, order, starts, out, key_heads, order.shape[1], order.shape[2], keys, E=width, BLOCK_E=block_e, BLOCK_N=block_n
    )  # fmt: skip


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor, last: Tensor | None, scale: float, layout: Layout
) -> tuple[tuple[Tensor, ...], tuple[Any, ...], dict[str, Any]]:
    """The tensors, the numbers and the constants that all kernels over pairs of query and key take."""
    (q,), (k, v) = _aligned(q.contiguous()), _aligned(*(x if _lies_in_rows(x) else x.contiguous() for x in (k, v)))
    groups = layout.key_heads if layout.own else layout.groups
    numbers: tuple[int, ...] = (
        layout.units,
        layout.rows,
        layout.size,
        layout.sharing,
        layout.key_heads,
        groups,
        layout.blocks,
        layout.queries,
    )
    numbers += (index.shape[3], k.shape[2], *k.stride()[:3], *v.stride()[:3])
    constants = _constants(q.shape[3], v.shape[3], layout, last is not None, q.dtype) | {"WIDE": backend.interpreting()}
    return (q, k, v, index, valid.view(torch.uint8), index if last is None else last), (*numbers, scale), constants


def _lies_in_rows(x_bhne: Tensor) -> bool:
    """Whether the last axis is together, and every row starts at a multiple of 16 bytes if the first one does."""
    return x_bhne.stride(3) == 1 and all(stride * x_bhne.itemsize % 16 == 0 for stride in x_bhne.stride()[:3])


def _aligned(*tensors: Tensor) -> list[Tensor]:
    """The kernels read 16 bytes at once; a view into another tensor may start elsewhere."""
    return [x.clone() if x.data_ptr() % 16 else x for x in tensors]


def _constants(width: int, value_width: int, layout: Layout, causal: bool, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "E": width,
        "EV": value_width,
        "BLOCK_E": _block(width),
        "BLOCK_EV": _block(value_width),
        "OWN": layout.own,
        "CAUSAL": causal,
        "PRECISION": "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32",
    }


def _block(width: int) -> int:
    return max(32, int(triton.next_power_of_2(width)))


def _tile(kernel: str, layout: Layout, q: Tensor, v: Tensor) -> Tile:
    return _tile_of(kernel, layout.rows <= FEW, q.dtype, max(q.shape[3], v.shape[3]))


def _tile_of(kernel: str, few: bool, dtype: torch.dtype, width: int) -> Tile:
    """The largest tried that do not spill in `kernels.aot`. Products of float32 are formed outside of the tensor cores, from registers."""
    if dtype == torch.float32:
        if kernel == "slots" or not (few or width > 64):
            return Tile(32, 32, 8, 1)
        return Tile(FEW, 16, 8, 2 if kernel == "fwd" else 1)
    if few:
        return {"fwd": Tile(FEW, 64, 4, 2), "dq": Tile(FEW, 32, 8, 2), "slots": Tile(FEW, 64, 8, 1)}[kernel]
    if kernel == "fwd":
        return Tile(64, 64, 8, 3) if width > 64 else Tile(64, 64, 4, 2)
    return Tile(64, 64, 8, 1 if kernel == "slots" else 2)


def _options(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "num_warps": tile.warps, "num_stages": tile.stages}


def specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    """The kernels that ``shapes`` lead to, in float32 and bfloat16.

    Those with few queries, bound by memory, and those of float32, formed outside of the tensor cores, name no tile.
    """
    result: dict[str, KernelSpec] = {}
    for case in (Case(*shape) for shape in shapes):
        for dtype in (torch.float32, torch.bfloat16):
            if max(case.width, case.value_width) <= MAX_WIDTH[dtype]:
                result |= {spec.name: spec for spec in (*_pair_specs(case, dtype), *_sum_specs(case, dtype))}
    return list(result.values())


def _pair_specs(case: Case, dtype: torch.dtype) -> Iterator[KernelSpec]:
    """The kernels over pairs of query and key."""
    few, tensor = case.layout.rows <= FEW, f"*{_TYPES[dtype]}"
    constants = _constants(case.width, case.value_width, case.layout, bool(case.causal), dtype) | {"WIDE": False}
    names = "units rows size sharing key_heads groups blocks length kept keys k_b k_h k_n v_b v_h v_n"
    tail = dict.fromkeys(names.split(), "i32") | {"scale": "fp32"} | dict.fromkeys((*constants, "BLOCK_M", "BLOCK_N"), "constexpr")
    head = dict.fromkeys(("Q", "K", "V"), tensor) | {"INDEX": "*i32", "VALID": "*u8", "LAST": "*i64" if case.causal else "*i32"}
    given = head | {"DY": tensor, "LSE": "*fp32", "DELTA": "*fp32"}
    shares = {"Y": "*fp32" if few and case.kept > SPAN else tensor, "LSE": "*fp32", "span": "i32", "total": "i32"}
    kind = f"{'own_' * case.layout.own}{'causal_' * bool(case.causal)}{'few_' * few}{_TYPES[dtype]}_{case.width}_{case.value_width}"
    for name, kernel, signature in (
        ("fwd", forward_kernel, head | shares),
        ("dq", query_grad_kernel, given | {"Y": tensor, "DQ": tensor}),
        ("slots", slot_grad_kernel, given | {"DK": "*fp32", "DV": "*fp32"}),
    ):
        tile = _tile_of(name, few, dtype, max(case.width, case.value_width))
        fed = None if few or dtype == torch.float32 else (tile.m, tile.n, min(constants["BLOCK_E"], constants["BLOCK_EV"]))
        blocks = constants | {"BLOCK_M": tile.m, "BLOCK_N": tile.n}
        yield KernelSpec(f"selected_attention_{name}_{kind}", kernel, signature | tail, blocks, tile.warps, tile.stages, fed)


def _sum_specs(case: Case, dtype: torch.dtype) -> Iterator[KernelSpec]:
    """The kernels that sum."""
    tensor, suffix = f"*{_TYPES[dtype]}", _TYPES[dtype]
    if case.layout.rows <= FEW and case.kept > SPAN:
        blocks = {"EV": case.value_width, "BLOCK_EV": _block(case.value_width), "BLOCK_M": _COMBINED}
        signature = {"SHARES": "*fp32", "SHARE_LSE": "*fp32", "Y": tensor, "LSE": "*fp32", "shares": "i32", "total": "i32"}
        signature |= dict.fromkeys(blocks, "constexpr")
        yield KernelSpec(f"selected_attention_combine_{suffix}_{case.value_width}", combine_kernel, signature, blocks)
    for width in {case.width, case.value_width}:
        blocks = {"E": width, "BLOCK_E": _block(width), "BLOCK_N": _SUMMED // _block(width)}
        signature = {"SLOTS": "*fp32", "ORDER": "*i64", "STARTS": "*i64", "OUT": tensor}
        signature |= dict.fromkeys(("key_heads", "groups", "listed", "keys"), "i32") | dict.fromkeys(blocks, "constexpr")
        yield KernelSpec(f"selected_attention_sum_{suffix}_{width}", key_sum_kernel, signature, blocks)
