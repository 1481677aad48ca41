# SPDX-License-Identifier: Apache-2.0
"""The course of gradients in deep stacks: what is taken of it, its picture, and that RankMixer's leaves the band where ours stays."""

import statistics

import pytest

from benchmarks.ranking_depth import HIGH, LOW, TOGETHER, Course, build, course, picture
from recsys.scaling.data import PlantedData


def test_a_single_step_moves_no_median_and_the_start_counts_by_itself() -> None:
    ratios = [0.5] + [2.0] * 14 + [1e6] + [2.0] * 14
    own = Course(ratios)
    assert own.medians == [statistics.median(ratios[i : i + TOGETHER]) for i in range(21)]
    assert (own.lowest, own.highest) == (0.5, 2.0)
    falling = Course([1.0] * 10 + [0.01] * 10)
    assert (falling.lowest, falling.highest) == (0.01, 1.0)
    assert str(falling) == "1; 0.01 to 1"


def test_the_picture_has_a_panel_for_each_model_and_a_curve_for_each_depth() -> None:
    drawn = picture({"first": {"2": [1.0] * 20, "4": [2.0] * 20}, "second": {"2": [0.1] * 20, "4": [3.0] * 20}})
    assert drawn.startswith("<svg")
    assert all(text in drawn for text in ("first", "second", "2 blocks", "4 blocks"))


@pytest.mark.slow
def test_rankmixer_leaves_the_band_at_32_blocks_as_it_begins_to_learn_and_tokenmixer_large_does_not() -> None:
    data = PlantedData(PlantedData.Config())
    theirs, ours = (course(build(data, name, 32), data, 2 * TOGETHER) for name in ("rankmixer", "tokenmixer_large, mean"))
    assert theirs.lowest < LOW
    assert ours.lowest > LOW and ours.highest < HIGH
