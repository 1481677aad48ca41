# SPDX-License-Identifier: Apache-2.0
"""Business rules as pure functions: quotas hold, lists are filled wherever they can be, and no diversity changes nothing."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recsys.bundle.rules import NO_RULES, Quota, Rules
from recsys.inference import rules

VALUES = st.lists(st.lists(st.sampled_from("abc"), max_size=3), min_size=1, max_size=30)
SINGLE = st.lists(st.sampled_from("abc").map(lambda value: [value]), min_size=1, max_size=30)


def order_of(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


@given(VALUES, VALUES, st.integers(0, 5), st.integers(0, 5), st.integers(0, 9))
def test_quotas_hold_and_nothing_that_fits_is_left_out(one: list, two: list, most: int, more: int, seed: int) -> None:
    count = min(len(one), len(two))
    values, quotas = [one[:count], two[:count]], [Quota(attribute="a", most=most), Quota(attribute="b", most=more)]
    order = order_of(seed, count)
    chosen = rules.within_quotas(order, values, quotas).tolist()
    totals = [Counter(value for place in chosen for value in set(of[place])) for of in values]
    assert all(number <= quota.most for total, quota in zip(totals, quotas, strict=True) for number in total.values())
    assert chosen == [place for place in order.tolist() if place in chosen], "in the order that was given"
    for place in set(range(count)) - set(chosen):
        full = [total[value] >= quota.most for total, quota, of in zip(totals, quotas, values, strict=True) for value in of[place]]
        assert any(full), "whatever was left out does not fit"


@given(SINGLE, st.integers(0, 5), st.integers(0, 9))
def test_with_one_quota_no_list_is_longer(values: list, most: int, seed: int) -> None:
    chosen = rules.within_quotas(order_of(seed, len(values)), [values], [Quota(attribute="a", most=most)])
    assert len(chosen) == sum(min(most, number) for number in Counter(value for (value,) in values).values())


@given(st.integers(1, 20), st.integers(1, 25), st.floats(0, 1), st.integers(0, 9))
def test_a_diverse_list_is_full_in_order_and_begins_with_the_best(count: int, k: int, diversity: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    score, vectors = rng.normal(size=count).astype(np.float32), rng.normal(size=(count, 4)).astype(np.float32)
    order = np.argsort(-score)
    chosen = rules.diverse(order, score, lambda places: vectors[places], k, diversity)
    assert len(set(chosen.tolist())) == len(chosen) == min(k, count)
    assert (np.diff(score[chosen]) <= 0).all() and chosen[0] == order[0]
    if diversity == 0:
        assert (chosen == order[:k]).all()


@given(st.integers(2, 12), st.integers(2, 12), st.floats(0.01, 1), st.integers(0, 9))
def test_a_diverse_list_is_greedy_marginal_relevance(count: int, k: int, diversity: float, seed: int) -> None:
    """Against the definition of Carbonell and Goldstein, written out."""
    rng = np.random.default_rng(seed)
    score, vectors = rng.normal(size=count), rng.normal(size=(count, 4))
    order = np.argsort(-score)
    chosen = rules.diverse(order, score, lambda places: vectors[places], k, diversity)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    importance = (score - score.min()) / (score.max() - score.min())
    taken = [int(order[0])]
    while len(taken) < min(k, count):
        rest = [place for place in range(count) if place not in taken]
        taken.append(max(rest, key=lambda p: (1 - diversity) * importance[p] - diversity * max(unit[p] @ unit[c] for c in taken)))
    assert set(chosen.tolist()) == set(taken)


def test_what_a_request_leaves_open_is_the_bundles() -> None:
    default = Rules(exclude=("1",), quotas=(Quota(attribute="genre", most=2),), diversity=0.3)
    assert Rules().over(default) == default
    asked = Rules(exclude=("2",), diversity=0.0).over(default)
    assert (asked.exclude, asked.quotas, asked.diversity) == (("1", "2"), default.quotas, 0.0)
    assert not NO_RULES.over(default).choose
