# SPDX-License-Identifier: Apache-2.0
"""Int8 pooling as the torch.library op ``recsys::int8_pooling``, with a fake implementation and without a gradient."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from kernels import backend
from kernels.int8_pooling import cpu, reference
from kernels.int8_pooling.reference import HEADER
from kernels.library import define
from kernels.op import KernelSpec, Op, Shape, Work

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Rows of the table, width, bags, values.
SHAPES: tuple[Shape, ...] = (
    (1, 1, 1, 1),
    (50, 63, 7, 40),
    (100, 16, 20, 64),
    (9, 100, 33, 5),
    (1000, 128, 3, 300),
    (20, 300, 4, 20),
    (5, 8, 6, 0),
)


def int8_pooling(rows: Tensor, values: Tensor, offsets: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sums of bags of rows of an int8 table; see `kernels.int8_pooling.reference`, also for what a stored row is.

    Args:
        rows: uint8 ``[R, 4 + D]``.
        values: int32 or int64 ``[N]``, 0 to R - 1. They are checked on the CPU, and not on a GPU, which would have to wait.
        offsets: int32 or int64 ``[B + 1]``, from 0 to N, not descending; a bag may be empty. Checked as the values are.
        dtype: of the result: float32, bfloat16 or float16. Sums are taken in float32.

    Returns:
        ``[B, D]``.

    Raises:
        ValueError: a tensor of another dtype or number of axes, rows without a column, no offset, or another dtype for the result.
        RuntimeError: on the CPU, a value is beyond the table, or the offsets do not divide the values into bags.
    """
    if rows.dtype != torch.uint8 or rows.ndim != 2 or rows.shape[1] <= HEADER:
        raise ValueError(f"rows: expected torch.uint8 [R, {HEADER} + D], got {rows.dtype} of shape {tuple(rows.shape)}")
    for name, given, least in (("values", values, 0), ("offsets", offsets, 1)):
        if given.dtype not in (torch.int32, torch.int64) or given.ndim != 1 or given.shape[0] < least:
            raise ValueError(
                f"{name}: expected int32 or int64 of one axis, at least {least}, got {given.dtype} of shape {tuple(given.shape)}"
            )
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
    values, offsets = values.to(torch.int64).contiguous(), offsets.to(torch.int64).contiguous()
    return cast(Tensor, _forward(rows.contiguous(), values, offsets, dtype))


@define("recsys::int8_pooling")
def _forward(rows: Tensor, values: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    module, here = backend.implementation("int8_pooling", rows), rows.device.type == "cpu"
    if module is not None and (module is not cpu or here):  # FBGEMM's look-up is the processor's
        return cast(Tensor, module.forward(rows, values, offsets, dtype))
    if here:
        cpu.check(rows, values, offsets)
    return reference.int8_pooling(rows, values, offsets, dtype)


@_forward.register_fake
def _(rows: Tensor, values: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.new_empty(offsets.shape[0] - 1, rows.shape[1] - HEADER, dtype=dtype)


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    table, width, bags, n = shape
    header = torch.stack((0.01 * torch.rand(table, generator=generator), torch.randn(table, generator=generator)), 1).half()
    q = torch.randint(0, 256, (table, width), dtype=torch.uint8, generator=generator)
    values = torch.randint(0, table, (n,), generator=generator)
    bounds = torch.randint(0, n + 1, (bags - 1,), generator=generator).sort().values
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), bounds, torch.tensor([n])))
    return torch.cat((header.view(torch.uint8), q), 1), values, offsets, dtype


def _specs(shapes: Sequence[Shape]) -> list[KernelSpec]:
    from kernels.int8_pooling import triton_ops

    return triton_ops.specs(shapes)


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """Rows, values and offsets in, sums out; a product and two sums for each byte."""
    _, width, bags, n = shape
    return Work(flops=3 * n * width, read=n * (HEADER + width + 8) + 8 * (bags + 1), written=bags * width * dtype.itemsize)


OP = Op("int8_pooling", int8_pooling, reference.int8_pooling, _inputs, SHAPES, small=None, work=_work, specs=_specs)
