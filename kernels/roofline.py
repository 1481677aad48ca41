# SPDX-License-Identifier: Apache-2.0
"""What each op must do at the recipes' shapes, and how fast an H100 could do it: the tables of ``docs/kernels_roofline.md``.

    python -m kernels.roofline > docs/kernels_roofline.md

Peaks are those of NVIDIA's datasheet of the H100 SXM, dense, bfloat16 with products in the tensor cores. FLOPs and bytes are those that an
op cannot do without (`kernels.op.Work`), beside the bytes that our kernels move (`kernels.traffic`).
"""

from collections.abc import Iterator

import torch

from kernels.op import Op, Shape
from kernels.registry import OPS
from kernels.shapes import RECIPES
from kernels.traffic import moved

TENSOR_FLOPS, VECTOR_FLOPS, BYTES = 989e12, 67e12, 3.35e12  # a second
# Without matrix products.
VECTOR = {"rms_norm", "square_sums", "log_sinkhorn", "fsq", "int8_pooling", "constrained_step", "gather_topk", "paged_scores"}
_HEAD = """# Roofline

Written by `python -m kernels.roofline`. For each op at the shapes of the recipes, forward and backward where it has a gradient, in
bfloat16: the operations and the bytes that it cannot do without, operations for each byte, and the floor on an H100 SXM by its datasheet
({flops:.0f} TFLOP/s in the tensor cores, {vector:.0f} outside, {bytes:.2f} TB/s): no kernel can be faster, and which ceiling binds.

*Moved* is what our Triton kernels read and write, counted from their launches at the tiles that they have, and by what it exceeds the
bytes that nothing can do without: values in between that are written and read again, and inputs that several launches read. *Limit* is
the time that the larger of operations and moved bytes takes at the same rates, over the floor: how far these kernels are from it at best.

Where the floor is 5 µs and more (below, a launch takes longer than the op) the limit is within 2, but for three shapes. Routed experts
16 x 2048 write each row's outputs of three experts and sum them afterwards, and so do the gradients of keys that several blocks of selected
attention have chosen: sums in a fixed order, where atomic additions would move half of it and give other bits every time.
"""


def row(op: Op, shape: Shape) -> list[str]:
    """A line of the table."""
    work = op.work(shape, torch.bfloat16)
    least, ours = work.read + work.written, moved(op, shape, torch.bfloat16)
    by_flops, by_bytes = work.flops / (VECTOR_FLOPS if op.name in VECTOR else TENSOR_FLOPS), least / BYTES
    binds, floor = "memory" if by_bytes > by_flops else "operations", max(by_flops, by_bytes)
    figures = (f"{work.flops / 1e9:.3g}", f"{least / 1e6:.3g}", f"{work.flops / least:.3g}", f"{1e6 * floor:.3g}")
    return [
        " ".join(map(str, shape)),
        *figures,
        binds,
        f"{ours / 1e6:.3g}",
        f"{ours / least:.2f}",
        f"{max(by_flops, ours / BYTES) / floor:.2f}",
    ]


def page() -> Iterator[str]:
    """The lines of the page."""
    yield _HEAD.format(flops=TENSOR_FLOPS / 1e12, vector=VECTOR_FLOPS / 1e12, bytes=BYTES / 1e12)
    for op in OPS:
        yield f"## {op.name}\n"
        yield "| shape | GFLOP | MB | FLOP / byte | floor, µs | binds | moved, MB | over MB | limit over floor |"
        yield "|---|---|---|---|---|---|---|---|---|"
        yield from ("| " + " | ".join(row(op, shape)) + " |" for shape in RECIPES[op.name])
        yield ""


if __name__ == "__main__":
    print("\n".join(page()).rstrip())
