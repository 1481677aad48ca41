# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation without a GPU: every kernel of the recipes fits its architecture without spilling."""

import pytest

from kernels.aot import ARCHITECTURES, SHARED_LIMIT, Usage, compile_spec
from kernels.op import Op
from kernels.registry import OPS
from kernels.shapes import RECIPES


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_no_kernel_spills(op: Op, arch: int) -> None:
    specs = op.specs(RECIPES[op.name])
    assert len({spec.name for spec in specs}) == len(specs) > 0
    usages = [compile_spec(spec, arch) for spec in specs]
    assert all(usage.registers > 0 for usage in usages)
    assert [usage for usage in usages if not usage.fits] == []


def test_a_spilling_kernel_does_not_fit() -> None:
    assert Usage("k", 80, 255, 0, 0).fits
    assert not Usage("k", 80, 255, 0, 8).fits
    assert not Usage("k", 80, 32, SHARED_LIMIT[80] + 1, 0).fits
