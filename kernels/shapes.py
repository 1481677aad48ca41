# SPDX-License-Identifier: Apache-2.0
"""The shapes at which the shipped recipes call each op: what must compile ahead of time and what benchmarks measure."""

from kernels.op import Shape

# rms_norm: (rows, width). Rows are batch x tokens: serving and training batches; the last is the widest row the kernel takes.
RECIPES: dict[str, tuple[Shape, ...]] = {
    "rms_norm": ((100 * 8, 64), (512 * 8, 64), (2048 * 16, 256), (2048 * 16, 512), (2048 * 32, 1024), (1024, 4096)),
}
