# SPDX-License-Identifier: Apache-2.0
"""Routed experts in Triton, launched: the pairs are sorted, their groups cut in tiles, and the kernels of `triton_kernels` started.

Which rows go where is data, how many programs there can be is not: n pairs in g groups make at most n / BLOCK_M + g tiles. So many are
started, a map made on the device tells each its group, and those too many end at once: the host never waits. The sort is a stable one of
the keys (token, expert), which gives the order that a counting sort inside each token would. Outputs of experts are written for each
pair, and a last kernel sums those of a row in the order of its choices: no atomics, and no row depends on its batch mates.

The backward pass keeps nothing of the hidden width and forms it again, for the reasons that `kernels.token_swiglu` gives: for SwiGLU that
is 4 of 22 operations, and the bytes of the inner layer, written, kept and read, would take longer up to D of about 600 on an H100.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.op import KernelSpec, Shape
from kernels.routed_experts.cpu import sort_pairs
from kernels.routed_experts.triton_kernels import (
    routed_combine_kernel,
    routed_hidden_bwd_kernel,
    routed_product_kernel,
    routed_up_kernel,
    routed_weight_grad_kernel,
)
from kernels.tiles import Tile, integers, mode_of, options, spec, together

BLOCK_M = 64  # pairs of a tile; groups are small and ragged, and one size needs one map


# By how products are formed: of two-byte elements, of float32 as TF32, of float32 as they are, and of these with weights of a byte. The
# largest tried that do not spill in `kernels.aot`.
UP = {
    "half": Tile(BLOCK_M, 64, 64, 8, 3),
    "tf32": Tile(BLOCK_M, 64, 32, 8, 3),
    "ieee": Tile(BLOCK_M, 64, 32, 16, 3),
    "byte_ieee": Tile(BLOCK_M, 64, 32, 8, 1),
}
HIDDEN = {"half": Tile(BLOCK_M, 64, 32, 8, 3), "tf32": Tile(BLOCK_M, 64, 32, 8, 2), "ieee": Tile(BLOCK_M, 64, 32, 8, 3)}
PRODUCT = {
    "half": Tile(BLOCK_M, 128, 64, 8, 3),
    "tf32": Tile(BLOCK_M, 64, 32, 8, 3),
    "ieee": Tile(BLOCK_M, 64, 32, 16, 3),
    "byte_ieee": Tile(BLOCK_M, 64, 32, 8, 1),
}
WEIGHT = {"half": Tile(64, 128, 64, 8, 3), "tf32": Tile(64, 64, 32, 8, 3), "ieee": Tile(64, 64, 32, 16, 3)}
COMBINE = (16, 128)  # rows and columns


class Plan(NamedTuple):
    """Where the sorted pairs come from and go: see `triton_kernels`, and `places`, the sorted place of each choice ``[T * B * k]``."""

    rows: Tensor
    gates: Tensor
    offsets: Tensor
    tiles: Tensor
    places: Tensor


def supports(x: Tensor, _: Tensor) -> bool:
    """Whether the kernels take the dtype of ``x [T, B, D]``, and a token's rows can be counted in 32 bits."""
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.shape[1] * x.shape[2] < 2**31


def forward(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    chosen: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    onto: Tensor | None,
    activation: str,
    _: bool,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result ``[T, B, D]``; nothing of the inner layer, which the backward pass forms again; the order and the offsets of the pairs.

    With ``scales`` of their columns, the weights are int8 or float8.
    """
    order, offsets = sort_pairs(chosen, weight_in.shape[1])
    plan = _plan(order, offsets, gates)
    fp8, (weight_in, weight_out) = weight_in.dtype == torch.float8_e4m3fn, (_bytes(one) for one in (weight_in, weight_out))
    x, weight_in = _rows_together(x), together(weight_in)
    hidden = torch.empty(len(order), weight_out.shape[2], dtype=x.dtype, device=x.device)
    scale_in, scale_out = (None, None) if scales is None else (scale.contiguous() for scale in scales)
    mode = _mode(x, scale_in)
    if len(order):
        routed_up_kernel[_grid(plan, hidden, UP[mode])](
            x, plan.rows, plan.gates, weight_in, scale_in, _contiguous(bias), offsets, plan.tiles, hidden,
            weight_in.shape[1], x.shape[2], hidden.shape[1], *x.stride()[:2], *weight_in.stride()[:3],
            FP8=fp8, SWIGLU=activation == "swiglu", **options(UP[mode], mode),
        )  # fmt: skip
    parts = _product(hidden, weight_out, plan, scale_out, fp8)
    return _combine(parts, plan, onto, x), x.new_empty(0, weight_in.shape[3]), order, offsets


def backward(
    dy: Tensor,
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    _: Tensor,
    order: Tensor,
    offsets: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight_in``, ``weight_out``, ``gates`` and ``bias``, the last one empty where there is none."""
    plan = _plan(order, offsets, gates)
    dy, x, weight_in, weight_out = _rows_together(dy), _rows_together(x), together(weight_in), together(weight_out)
    (experts, dim, width), hidden_width = weight_in.shape[1:], weight_out.shape[2]
    mode = _mode(x)
    hidden = torch.empty(len(order), hidden_width, dtype=x.dtype, device=x.device)
    dinner = torch.empty(len(order), width, dtype=x.dtype, device=x.device)
    grid = _grid(plan, hidden, HIDDEN[mode])
    shares = torch.zeros(grid[1], len(order), dtype=torch.float32, device=x.device)  # zero for the pairs without an expert
    if len(order):
        routed_hidden_bwd_kernel[grid](
            dy, x, plan.rows, plan.gates, weight_in, weight_out, _contiguous(bias), offsets, plan.tiles, hidden, dinner, shares,
            len(order), experts, dim, hidden_width,
            *dy.stride()[:2], *x.stride()[:2], *weight_in.stride()[:3], *weight_out.stride()[:3],
            SWIGLU=activation == "swiglu", **options(HIDDEN[mode], mode),
        )  # fmt: skip
    dgates = torch.empty(len(order), dtype=x.dtype, device=x.device).scatter_(0, order, shares.sum(0).to(x.dtype)).view(gates.shape)
    dx = _combine(_product(dinner, weight_in.transpose(2, 3), plan), plan, None, x)
    dbias = torch.empty(0 if bias is None else bias.shape, dtype=x.dtype, device=x.device)
    dweight_in, dweight_out = (torch.empty(one.shape, dtype=x.dtype, device=x.device) for one in (weight_in, weight_out))
    _weight_grad(x, dinner, plan, dweight_in, None if bias is None else dbias)
    _weight_grad(hidden, dy, plan, dweight_out)
    return dx, dweight_in, dweight_out, dgates, dbias


def _plan(order: Tensor, offsets: Tensor, gates: Tensor) -> Plan:
    tokens, batch, choices = gates.shape
    rows = torch.arange(batch, dtype=torch.int32, device=order.device)[:, None].expand(tokens, batch, choices).flatten()[order]
    sorted_places = torch.arange(len(order), device=order.device)
    places = torch.zeros_like(order).scatter_(0, order, sorted_places.where(sorted_places < offsets[-1], -1)).int()
    return Plan(rows, gates.flatten()[order], offsets, _tiles(offsets, len(order)), places)


def _tiles(offsets: Tensor, pairs: int) -> Tensor:
    """int32 ``[pairs // BLOCK_M + groups, 2]``: the group of each tile, -1 for a tile too many, and its first pair."""
    groups = len(offsets) - 1
    counts = (offsets.diff() + BLOCK_M - 1) // BLOCK_M
    ends = counts.cumsum(0)
    tile = torch.arange(pairs // BLOCK_M + groups, device=offsets.device)
    group = torch.searchsorted(ends, tile, right=True)
    at = group.clamp(max=groups - 1)
    first = offsets[at] + (tile - (ends - counts)[at]) * BLOCK_M
    return torch.stack((group.where(group < groups, -1), first), 1).int()


def _product(a: Tensor, weight: Tensor, plan: Plan, scale: Tensor | None = None, fp8: bool = False) -> Tensor:
    """``a @ weight`` of each group: ``[pairs, K]``, ``[T, E, K, N]`` → ``[pairs, N]``."""
    out = torch.empty(len(a), weight.shape[3], dtype=a.dtype, device=a.device)
    mode = _mode(a, scale)
    if len(a):
        routed_product_kernel[_grid(plan, out, PRODUCT[mode])](
            a, weight, scale, plan.offsets, plan.tiles, out, weight.shape[1], out.shape[1], a.shape[1], *weight.stride(),
            FP8=fp8, **options(PRODUCT[mode], mode),
        )  # fmt: skip
    return out


def _combine(parts: Tensor, plan: Plan, onto: Tensor | None, x: Tensor) -> Tensor:
    """``[T, B, D]``: the sum over the choices of each row, in their order, on top of ``onto``."""
    tokens, batch, dim = x.shape
    y = torch.empty(tokens, batch, dim, dtype=x.dtype, device=x.device)
    rows, (block_m, block_n) = tokens * batch, COMBINE
    if rows:
        routed_combine_kernel[(triton.cdiv(rows, block_m), triton.cdiv(dim, block_n))](
            parts, plan.places, _contiguous(onto), y, rows, dim, len(plan.places) // rows, BLOCK_M=block_m, BLOCK_N=block_n
        )  # fmt: skip
    return y


def _weight_grad(a: Tensor, b: Tensor, plan: Plan, out: Tensor, sums: Tensor | None = None) -> None:
    """``out [T, E, M, N]``: aᵀ @ b over the pairs of each group; the one of both with three axes, ``[T, B, ·]``, is gathered."""
    mode, (_, experts, m, n) = _mode(out), out.shape
    tile, source = WEIGHT[mode], a if a.ndim == 3 else b
    programs = (len(plan.offsets) - 1) * triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)
    if programs:
        routed_weight_grad_kernel[(programs,)](
            a, b, plan.rows, plan.offsets, out, sums, experts, m, n, *source.stride()[:2], GATHER_A=a.ndim == 3, **options(tile, mode)
        )  # fmt: skip


def _rows_together(x_tbd: Tensor) -> Tensor:
    """`together`, with the rows of a token so near to each other that the kernels' 32 bits reach from one to all."""
    return x_tbd.contiguous() if x_tbd.stride(1) * x_tbd.shape[1] >= 2**31 else together(x_tbd)


def _bytes(weight: Tensor) -> Tensor:
    """Float8 as the bytes that it is, since not every GPU has it as a type."""
    return weight.view(torch.int8) if weight.dtype == torch.float8_e4m3fn else weight


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _grid(plan: Plan, out: Tensor, tile: Tile) -> tuple[int, int]:
    return len(plan.tiles), triton.cdiv(out.shape[1], tile.n)


def _mode(x: Tensor, scale: Tensor | None = None) -> str:
    mode = mode_of(x)
    return "byte_ieee" if mode == "ieee" and scale is not None else mode


def specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    """All kernels with a bias and something to start from, in bfloat16 and in both ways of float32; one size of tiles serves all shapes."""
    if not shapes:
        return []
    result = []
    for mode, tensor in (("half", "*bf16"), ("tf32", "*fp32"), ("ieee", "*fp32")):
        hidden = _up(tensor) | {"DY": tensor, "V": tensor, "DINNER": tensor, "DGATES": "*fp32"} | integers("N dy_t dy_b v_t v_e v_h")
        down = _product_signature(tensor)
        weight = {"A": tensor, "B": tensor, "ROWS": "*i32", "OFFSETS": "*i64", "C": tensor, "SUMS": tensor} | integers("E M N r_t r_b")
        for name, known in _activations(shapes).items():
            result += [
                spec(f"routed_up_{name}_{mode}", routed_up_kernel, _up(tensor), UP[mode], mode, known | {"SCALE": None, "FP8": False}),
                spec(f"routed_hidden_bwd_{name}_{mode}", routed_hidden_bwd_kernel, hidden, HIDDEN[mode], mode, known),
            ]
        result += [
            spec(f"routed_product_down_{mode}", routed_product_kernel, down, PRODUCT[mode], mode, {"w_n": 1, "SCALE": None, "FP8": False}),
            spec(f"routed_product_dx_{mode}", routed_product_kernel, down, PRODUCT[mode], mode, {"w_k": 1, "SCALE": None, "FP8": False}),
            spec(f"routed_weight_grad_in_{mode}", routed_weight_grad_kernel, weight, WEIGHT[mode], mode, {"GATHER_A": True}),
            spec(
                f"routed_weight_grad_out_{mode}", routed_weight_grad_kernel, weight, WEIGHT[mode], mode, {"GATHER_A": False, "SUMS": None}
            ),
        ]
    for tensor in ("bf16", "fp32"):
        signature = {"PARTS": f"*{tensor}", "PLACES": "*i32", "ONTO": f"*{tensor}", "Y": f"*{tensor}"} | integers("M D choices")
        constants = dict(zip(("BLOCK_M", "BLOCK_N"), COMBINE, strict=True))
        signature |= dict.fromkeys(constants, "constexpr")
        result.append(KernelSpec(f"routed_combine_{tensor}", routed_combine_kernel, signature, constants))
    return result


def quantized_specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    """The two products of the forward pass with weights of a byte; what combines their outcomes is among `specs`."""
    result = []
    given = {"W": "*i8", "SCALE": "*fp32"}
    modes = (("half", "*bf16"), ("tf32", "*fp32"), ("byte_ieee", "*fp32"))
    for fp8, (mode, tensor) in product(sorted({shape[-1] for shape in shapes}), modes):
        suffix = f"{'fp8' if fp8 else 'int8'}_{mode.removeprefix('byte_')}"
        for name, known in _activations([shape[:-1] for shape in shapes]).items():
            signature = _up(tensor) | given
            result.append(spec(f"routed_up_{name}_{suffix}", routed_up_kernel, signature, UP[mode], mode, known | {"FP8": bool(fp8)}))
        signature, known = _product_signature(tensor) | given, {"w_n": 1, "FP8": bool(fp8)}
        result.append(spec(f"routed_product_down_{suffix}", routed_product_kernel, signature, PRODUCT[mode], mode, known))
    return result


def _activations(shapes: Sequence[Shape]) -> dict[str, dict[str, Any]]:
    return {"gelu" if gelu else "swiglu": {"SWIGLU": not gelu} for gelu in sorted({shape[-1] for shape in shapes})}


def _up(tensor: str) -> dict[str, str]:
    given = {
        "X": tensor,
        "W": tensor,
        "BIAS": tensor,
        "HIDDEN": tensor,
        "GATES": tensor,
        "ROWS": "*i32",
        "OFFSETS": "*i64",
        "TILES": "*i32",
    }
    return given | integers("E D H x_t x_b w_t w_e w_d")


def _product_signature(tensor: str) -> dict[str, str]:
    return {"A": tensor, "W": tensor, "OFFSETS": "*i64", "TILES": "*i32", "C": tensor} | integers("E N K w_t w_e w_k w_n")
