# SPDX-License-Identifier: Apache-2.0
"""What each op must do at the recipes' shapes, and how fast an H100 could do it: the tables of ``docs/kernels_roofline.md``.

    python -m kernels.roofline > docs/kernels_roofline.md

Peaks are those of NVIDIA's datasheet of the H100 SXM, dense, bfloat16 with products in the tensor cores. FLOPs and bytes are those that an
op cannot do without (`kernels.op.Work`).
"""

from collections.abc import Iterator

import torch

from kernels.op import Op, Shape
from kernels.registry import OPS
from kernels.shapes import RECIPES

TENSOR_FLOPS, VECTOR_FLOPS, BYTES = 989e12, 67e12, 3.35e12  # a second
# Without matrix products.
VECTOR = {"rms_norm", "square_sums", "log_sinkhorn", "fsq", "int8_pooling", "constrained_step", "gather_topk", "paged_scores"}
_HEAD = """# Roofline

Written by `python -m kernels.roofline`. For each op at the shapes of the recipes, forward and backward where it has a gradient, in
bfloat16: the operations and the bytes that it cannot do without, operations for each byte, and the floor on an H100 SXM by its datasheet
({flops:.0f} TFLOP/s in the tensor cores, {vector:.0f} outside, {bytes:.2f} TB/s): no kernel can be faster, and which ceiling binds.
"""


def row(op: Op, shape: Shape) -> list[str]:
    """A line of the table."""
    work = op.work(shape, torch.bfloat16)
    moved = work.read + work.written
    by_flops, by_bytes = work.flops / (VECTOR_FLOPS if op.name in VECTOR else TENSOR_FLOPS), moved / BYTES
    binds = "memory" if by_bytes > by_flops else "operations"
    figures = (f"{work.flops / 1e9:.3g}", f"{moved / 1e6:.3g}", f"{work.flops / moved:.3g}", f"{1e6 * max(by_flops, by_bytes):.3g}")
    return [" ".join(map(str, shape)), *figures, binds]


def page() -> Iterator[str]:
    """The lines of the page."""
    yield _HEAD.format(flops=TENSOR_FLOPS / 1e12, vector=VECTOR_FLOPS / 1e12, bytes=BYTES / 1e12)
    for op in OPS:
        yield f"## {op.name}\n"
        yield "| shape | GFLOP | MB | FLOP / byte | floor, µs | binds |"
        yield "|---|---|---|---|---|---|"
        yield from ("| " + " | ".join(row(op, shape)) + " |" for shape in RECIPES[op.name])
        yield ""


if __name__ == "__main__":
    print("\n".join(page()).rstrip())
