# SPDX-License-Identifier: Apache-2.0
"""The array routines against loops."""

import bisect
import math
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.ranges import RangeSums, bisect_right, expand, order_by, pieces, running_extremes

SMALL = st.integers(-5, 5)


@st.composite
def _ranges(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values = np.array(draw(st.lists(SMALL, max_size=12)), np.int64)
    rows = draw(st.integers(0, 6))
    ends = [sorted(draw(st.lists(st.integers(0, len(values)), min_size=2, max_size=2))) for _ in range(rows)]
    start, stop = np.array(ends, np.int64).reshape(-1, 2).T
    return values, start, stop


@settings(max_examples=150, deadline=None)
@given(_ranges(), st.data())
def test_bisect_right(ranges: tuple[np.ndarray, np.ndarray, np.ndarray], data: st.DataObject) -> None:
    values, start, stop = ranges
    values.sort()
    wanted = np.array(data.draw(st.lists(SMALL, min_size=len(start), max_size=len(start))), np.int64)
    expected = [bisect.bisect_right(values.tolist(), w, a, b) for w, a, b in zip(wanted, start.tolist(), stop.tolist(), strict=True)]
    assert bisect_right(values, wanted, start, stop).tolist() == expected


@settings(max_examples=150, deadline=None)
@given(_ranges(), st.sampled_from([1.0, 0.1, 1e300]))
def test_sums_and_expansion(ranges: tuple[np.ndarray, np.ndarray, np.ndarray], unit: float) -> None:
    values, start, stop = ranges
    positions = [list(range(a, b)) for a, b in zip(start.tolist(), stop.tolist(), strict=True)]
    assert expand(start, stop - start).tolist() == list(chain(*positions))
    sums = RangeSums(values * unit)(start, stop)
    for total, places in zip(sums.tolist(), positions, strict=True):
        assert total == pytest.approx(math.fsum((values * unit)[places]), rel=1e-13, abs=1e-13 * unit)
        # Not the least bit depends on what stands around the range.
        assert total == RangeSums((values * unit)[places])(np.array([0]), np.array([len(places)]))[0]


def test_sums_survive_huge_neighbours_and_infinity() -> None:
    values = np.array([1e308, 1e308, 0.1, 0.2, math.inf, 0.5, -math.inf])
    sums = RangeSums(values)(np.array([2, 5, 4, 0]), np.array([4, 6, 5, 0]))
    assert sums.tolist() == [0.1 + 0.2, 0.5, math.inf, 0.0]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(SMALL, max_size=6), max_size=4))
def test_running_extremes(groups: list[list[int]]) -> None:
    values = np.array(list(chain(*groups)), np.int64)
    group = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    highest, lowest = running_extremes(values, group)
    assert highest.tolist() == [max(g[: i + 1]) for g in groups for i in range(len(g))]
    assert lowest.tolist() == [min(g[i:]) for g in groups for i in range(len(g))]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 5), st.integers(1, 12))
def test_pieces(weights: list[int], rows: int, weight: int) -> None:
    cut = list(pieces(np.array(weights, np.int64), rows=rows, weight=weight))
    assert list(chain(*(weights[piece] for piece in cut))) == weights
    assert cut
    for piece, following in zip(cut, [*cut[1:], None], strict=True):
        count = piece.stop - piece.start
        assert count <= rows and (count <= 1 or sum(weights[piece]) <= weight)
        if following is not None:  # and no piece could have been longer
            assert count == rows or sum(weights[piece]) + weights[piece.stop] > weight


def test_the_order_is_numpys_whatever_the_range() -> None:
    rng = np.random.default_rng(0)
    limits = np.iinfo(np.int64)
    for high in (1, 5, 1 << 16, (1 << 16) + 1, 1 << 40):
        columns = [rng.integers(0, top, 500) for top in (4, high, 3)]
        assert order_by(*columns).tolist() == np.lexsort(columns[::-1]).tolist()
        assert order_by(columns[1] - high // 2, np.arange(500)).tolist() == np.argsort(columns[1], kind="stable").tolist()
    widest = np.array([limits.max, -1, limits.min, 0, limits.max, limits.min, 1 << 40])
    assert order_by(widest).tolist() == np.argsort(widest, kind="stable").tolist()
    assert order_by(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
