# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation without a GPU: every kernel of the recipes fits its architecture without spilling."""

import pytest

from kernels.aot import ARCHITECTURES, SHARED_LIMIT, Usage, compile_spec
from kernels.op import KernelSpec, Op
from kernels.registry import OPS
from kernels.shapes import RECIPES

QUICK = 90  # the others take as long again, and `make test-kernels` compiles for them


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=[] if arch == QUICK else pytest.mark.slow) for arch in ARCHITECTURES])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_no_kernel_spills(op: Op, arch: int) -> None:
    specs = op.specs(RECIPES[op.name])
    assert len({spec.name for spec in specs}) == len(specs) > 0
    usages = [compile_spec(spec, arch) for spec in specs]
    assert all(usage.registers > 0 for usage in usages)
    assert [usage for usage in usages if not usage.fits] == []


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_matrix_kernels_have_tiles_that_feed_the_tensor_cores(op: Op) -> None:
    """Two warps for each of the four schedulers of a multiprocessor, and tiles of at least 64 x 64 x 32."""
    for spec in op.specs(RECIPES[op.name]):
        if spec.tile is not None:
            assert all(have >= least for have, least in zip(spec.tile, (64, 64, 32), strict=True)), spec.name
            assert spec.num_warps * _resident(spec) >= 8, spec.name


def _resident(spec: KernelSpec) -> int:
    """How many programs a multiprocessor of sm_90 holds at once, by registers and shared memory."""
    usage = compile_spec(spec, 90)
    registers = 65536 // (usage.registers * 32 * spec.num_warps)
    return min(registers, SHARED_LIMIT[90] // max(usage.shared, 1))


def test_a_spilling_kernel_does_not_fit() -> None:
    assert Usage("k", 80, 255, 0, 0).fits
    assert not Usage("k", 80, 255, 0, 8).fits
    assert not Usage("k", 80, 32, SHARED_LIMIT[80] + 1, 0).fits
