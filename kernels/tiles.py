# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""What the matrix kernels share: tiles, the product of two of them, how products are formed, and how a kernel is specialised."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import interpreting
from kernels.op import KernelSpec


class Tile(NamedTuple):
    """Rows, columns and depth of a program's tile, its warps and the stages of its pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@triton.jit
def dot(a, b, total, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """``total + a @ b``, with a narrower ``b`` widened; the interpreter's bfloat16 is wrong in both, so that it takes float32."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b.to(a.dtype), total, input_precision=PRECISION)


def mode_of(x: Tensor) -> str:
    """How products are formed: ``half`` of two-byte elements, ``tf32`` of float32 where PyTorch allows it, else ``ieee``."""
    if x.itemsize == 2:
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def precision_of(mode: str) -> str:
    """What ``tl.dot`` calls it."""
    return "ieee" if mode.endswith("ieee") else "tf32"


def constants(tile: Tile, mode: str, wide: bool) -> dict[str, Any]:
    """The compile-time arguments of a kernel with such a tile."""
    return {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "WIDE": wide, "PRECISION": precision_of(mode)}


def options(tile: Tile, mode: str) -> dict[str, Any]:
    """`constants` as a launch wants them, with warps and stages."""
    return constants(tile, mode, interpreting()) | {"num_warps": tile.warps, "num_stages": tile.stages}


def together(x: Tensor) -> Tensor:
    """``x`` with its last axis together in memory; the others may lie anyhow."""
    return x if x.stride(-1) == 1 else x.contiguous()


def integers(names: str) -> dict[str, str]:
    """The types of arguments that are sizes and strides."""
    return dict.fromkeys(names.split(), "i32")


def spec(name: str, kernel: Any, signature: dict[str, str], tile: Tile, mode: str, known: dict[str, Any]) -> KernelSpec:
    """A specialisation; ``known`` are arguments that Triton compiles in as constants: flags, strides of 1 and absent tensors."""
    fixed = constants(tile, mode, wide=False) | known
    signature = signature | dict.fromkeys(fixed, "constexpr")
    return KernelSpec(name, kernel, signature, fixed, tile.warps, tile.stages, (tile.m, tile.n, tile.k))
