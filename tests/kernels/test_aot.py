# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation without a GPU: every kernel of the recipes fits its architecture without spilling."""

from argparse import ArgumentTypeError

import pytest

from kernels.aot import ARCHITECTURES, SHARED_LIMIT, Usage, architectures, compile_spec
from kernels.op import Op
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
            assert spec.num_warps * compile_spec(spec, 90).resident >= 8, spec.name


def test_architectures_are_named_as_nvidia_names_them() -> None:
    assert architectures("sm_80,sm_90,sm_100") == architectures("80, 90,100") == ARCHITECTURES
    with pytest.raises(ArgumentTypeError, match="expected some of sm_80, sm_90, sm_100, got sm_70"):
        architectures("sm_90,sm_70")


def test_a_spilling_kernel_does_not_fit() -> None:
    assert Usage("k", 80, 255, 0, 0, 4).fits
    assert not Usage("k", 80, 255, 0, 8, 4).fits
    assert not Usage("k", 80, 32, SHARED_LIMIT[80] + 1, 0, 4).fits


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "resident", "occupancy"),
    [
        (32, 0, 4, 16, 1.0),  # 64 warps in all
        (255, 0, 8, 1, 0.125),  # 256 registers of 256 threads are all there are
        (128, 0, 8, 2, 0.25),
        (33, 0, 4, 12, 0.75),  # counted as 40
        (32, 100 * 1024, 4, 2, 0.125),  # 101 KiB of 228
        (16, 0, 1, 32, 0.5),  # 32 blocks in all
    ],
)
def test_occupancy_is_that_of_the_scarcest(registers: int, shared: int, warps: int, resident: int, occupancy: float) -> None:
    usage = Usage("k", 90, registers, shared, 0, warps)
    assert (usage.resident, usage.occupancy) == (resident, occupancy)
