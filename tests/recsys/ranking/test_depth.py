# SPDX-License-Identifier: Apache-2.0
"""Gradients in deep stacks, on planted impressions."""

import pytest

from benchmarks.ranking_depth import build, first_over_last
from recsys.scaling.data import PlantedData

DATA = PlantedData(PlantedData.Config())


def at_the_start(name: str, blocks: int) -> float:
    model = build(DATA, name, blocks)
    batch = next(iter(DATA.train(rows=512, seed=0, batch_size=512)))
    model.loss(batch)[0].backward()
    return first_over_last(model)


@pytest.mark.parametrize("blocks", [2, 8, 32])
def test_with_halved_sums_the_first_block_learns_as_the_last_at_every_depth(blocks: int) -> None:
    assert 0.1 < at_the_start("tokenmixer_large, mean", blocks) < 10


def test_plain_sums_double_the_first_blocks_gradient_at_every_junction() -> None:
    """With gap 2 and L blocks there are L / 2 - 1 sums; each doubles what came before and leaves the last block's share as it is."""
    shallow, deep = at_the_start("tokenmixer_large, sum", 16), at_the_start("tokenmixer_large, sum", 24)
    assert deep > 10
    assert 2**4 / 2 < deep / shallow < 2**4 * 2
