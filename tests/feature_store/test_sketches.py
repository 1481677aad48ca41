# SPDX-License-Identifier: Apache-2.0
"""Sketches: their declared errors hold over many seeds, and merging is associative, commutative and idempotent to the bit."""

import bisect
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.exact_sums import Sums
from feature_store.features import Distinct, Quantile
from feature_store.partials import Counts, ExactSums, Extremes, Registers, Samples, States
from feature_store.sketches import estimate, quantiles, registers
from recsys.core.hashing import hash64


def one_each(count: int) -> np.ndarray:
    return np.arange(count + 1)


def over_all(states: Any) -> Any:
    """One tile of all."""
    count = len(states.offsets) - 1
    return states.over(np.array([0]), np.array([count]))


def registers_of(values: list[str], precision: int) -> Registers:
    return Registers(one_each(len(values)), registers(hash64(pa.array(values, pa.string()), 11), precision))


@pytest.mark.parametrize("precision", [6, 10, 12])
def test_distinct_counts_are_as_near_as_declared(precision: int) -> None:
    """Within 3 standard errors in at least 99 of 100 cases, and their mean square is that of the declared one, from few to many."""
    declared = Distinct(name="x", column="c", precision=precision).error
    within, cases, squares = 0, 0, []
    for seed in range(60):
        for count in (1, 5, 40, 300, 1 << precision, 5 << precision):
            held = over_all(registers_of([f"{seed}-{n}" for n in range(count)], precision))
            error = estimate(held.offsets, held.codes, precision)[0] / count - 1
            within, cases = within + (abs(error) <= 3 * declared or abs(error * count) <= 0.6), cases + 1
            squares.append(error**2)
    assert within >= 0.99 * cases
    assert math.sqrt(np.mean(squares)) <= 1.1 * declared


def test_small_sets_are_counted_exactly_and_repetitions_do_not_count() -> None:
    values = [f"v{n}" for n in range(30)]
    for count in range(31):
        held = over_all(registers_of(values[:count] * 3, 14))
        assert round(estimate(held.offsets, held.codes, 14)[0]) == count


def sample_of(values: np.ndarray, seed: int, size: int) -> Samples:
    hashes = hash64(pa.array(np.arange(len(values)) + (seed << 32), pa.int64()), 12).view(np.int64)
    return over_all(Samples(one_each(len(values)), hashes, values, size))


@pytest.mark.parametrize("q", [0.0, 0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["normal", "heavy", "few", "sorted"])
def test_quantiles_have_the_rank_that_is_declared(q: float, kind: str) -> None:
    size, cases = 128, 300
    declared, within = Quantile(name="x", column="c", q=q, size=size).error, 0
    for seed in range(cases):
        rng = np.random.default_rng(seed)
        values = {
            "normal": lambda rng=rng: rng.normal(size=2000),
            "heavy": lambda rng=rng: rng.pareto(0.5, 2000),
            "few": lambda rng=rng: rng.integers(0, 4, 2000).astype(np.float64),
            "sorted": lambda: np.arange(2000.0),
        }[kind]()
        sample = sample_of(values, seed, size)
        answer, ordered = quantiles(sample.offsets, sample.values, q)[0], np.sort(values).tolist()
        # The ranks that values equal to the answer take.
        low, high = bisect.bisect_left(ordered, answer) / 2000, bisect.bisect_right(ordered, answer) / 2000
        within += low - declared <= q <= high + declared
    assert within >= 0.99 * cases


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.7, 0.99, 1.0])
def test_quantiles_of_few_values_are_exact(q: float) -> None:
    for count in (1, 2, 10, 100):
        values = np.random.default_rng(count).normal(size=count)
        sample = sample_of(values, 0, 128)
        place = max(math.ceil(round(q * count, 9)), 1) - 1
        assert quantiles(sample.offsets, sample.values, q)[0] == np.sort(values)[place]
    assert np.isnan(quantiles(np.array([0, 0]), np.zeros(0), q)[0])


KINDS = ("count", "sum", "least", "greatest", "distinct", "sample")
EVENTS = st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 10**6)), max_size=40, unique_by=lambda event: event[1])


def states_of(kind: str, events: list[tuple[float, int]]) -> States:
    values = np.array([value for value, _ in events], np.float64) + 0.0
    places = pa.array([place for _, place in events], pa.int64())
    match kind:
        case "count":
            return Counts(np.ones(len(events), np.int64))
        case "sum":
            return ExactSums(Sums.of(values))
        case "least" | "greatest":
            return Extremes(values, kind == "greatest")
        case "distinct":
            return Registers(one_each(len(events)), registers(hash64(places, 11), 4))
        case _:
            return Samples(one_each(len(events)), hash64(places, 12).view(np.int64), values, 5)


def merged(kind: str, events: list[tuple[float, int]], bounds: list[int]) -> list[Any]:
    """Merged part by part, and then the parts; as it is stored."""
    ends = np.array(sorted({0, len(events), *bounds}))
    start, stop = (ends[:-1], ends[1:]) if len(ends) > 1 else (ends, ends)
    parts = states_of(kind, events).over(start, stop)
    return [array.to_pylist() for array in parts.over(np.array([0]), np.array([len(start)])).to_arrow()]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), EVENTS, st.data())
def test_merging_is_associative_and_commutative(kind: str, events: list[tuple[float, int]], data: st.DataObject) -> None:
    whole = merged(kind, events, [])
    for _ in range(3):
        bounds = data.draw(st.lists(st.integers(0, len(events)), max_size=5))
        assert merged(kind, data.draw(st.permutations(events)), bounds) == whole


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(("least", "greatest", "distinct")), EVENTS)
def test_merging_with_itself_changes_nothing(kind: str, events: list[tuple[float, int]]) -> None:
    assert merged(kind, events * 2, [len(events)]) == merged(kind, events, [])
