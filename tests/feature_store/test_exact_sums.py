# SPDX-License-Identifier: Apache-2.0
"""Sums without rounding: the standard library's `fsum` and fractions say what they must be, to the bit."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.exact_sums import Sums

ANY = st.floats(allow_nan=False, allow_infinity=False)
NEAR = st.sampled_from([0.1, -0.1, 1e16, -1e16, 1.0, 3.5, -0.0, 5e-324, 2.0**-1022, 1e308, -1e308, 2.0**53, 1 / 3])
VALUES = st.lists(ANY | NEAR, max_size=12)


def exact(values: list[float]) -> float:
    """The exact sum, rounded once."""
    total = sum((Fraction(value) for value in values), Fraction(0))
    try:
        return float(total)
    except OverflowError:
        return math.inf if total > 0 else -math.inf


def total(values: list[float]) -> float:
    return float(Sums.of(np.array(values, np.float64)).over(np.array([0]), np.array([len(values)])).values()[0])


@settings(max_examples=500, deadline=None)
@given(VALUES)
def test_the_sum_is_rounded_once(values: list[float]) -> None:
    assert total(values) == exact(values)


@settings(max_examples=200, deadline=None)
@given(VALUES, st.randoms(use_true_random=False))
def test_neither_order_nor_grouping_changes_a_bit(values: list[float], rng: random.Random) -> None:
    shuffled, cut = list(values), rng.randint(0, len(values))
    rng.shuffle(shuffled)
    one, other = Sums.of(np.array(values, np.float64)), Sums.of(np.array(shuffled, np.float64))
    ends = np.array([0, 0]), np.array([cut, len(values)])
    whole = [array.tolist() for array in one.over(*ends).ragged()]
    again = other.over(np.array([0, cut]), np.array([cut, len(values)]))  # two parts, which are then added
    added = again.over(np.array([0]), np.array([2])).ragged()
    last = len(whole[2]) - (whole[1][2] - whole[1][1])
    assert (whole[0][1], whole[2][last:]) == (int(added[0][0]), added[2].tolist())


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_what_is_stored_is_read_back(values: list[float]) -> None:
    sums = Sums.of(np.array(values, np.float64))
    again = Sums.of_ragged(*sums.ragged())
    assert again.values().tolist() == sums.values().tolist() == [value + 0.0 for value in values]
    assert [array.tolist() for array in again.ragged()] == [array.tolist() for array in sums.ragged()]


@pytest.mark.parametrize("scale", [1.0, 1e-300, 1e290, 2.0**-1060])
def test_many_ranges_of_many_values(scale: float) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=3000) * 10.0 ** rng.integers(-8, 9, 3000) * scale
    start = rng.integers(0, 3000, 500)
    stop = np.minimum(start + rng.integers(0, 3000, 500), 3000)
    sums = Sums.of(values).over(start, stop).values()
    assert sums.tolist() == [math.fsum(values[a:b]) for a, b in zip(start, stop, strict=True)]


def test_ratings_take_few_digits() -> None:
    ratings = Sums.of(np.array([1.0, 4.5, 3.0] * 1000))
    assert ratings.digits.shape[1] <= 3
    assert ratings.over(np.array([0]), np.array([3000])).values().tolist() == [8500.0]


def test_a_sum_may_be_too_large_on_the_way() -> None:
    assert total([1e308, 1e308, -1e308]) == 1e308
    assert total([1.7e308, 1.7e308]) == math.inf and total([-1.7e308, -1.7e308]) == -math.inf
    assert Sums.of(np.zeros(3)).values().tolist() == [0.0] * 3 and len(Sums.of(np.zeros(0))) == 0
