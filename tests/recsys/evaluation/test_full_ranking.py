# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.jagged import Jagged
from recsys.evaluation import full_ranking
from recsys.evaluation.full_ranking import target_ranks
from recsys.evaluation.metrics.ranking import mrr, ndcg_at, recall_at


def jagged(rows: list[list[int]]) -> Jagged:
    return Jagged(
        np.array([i for row in rows for i in row], np.int64), np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(int)
    )


def brute(scores: np.ndarray, targets: list[list[int]], exclude: list[list[int]], eligible: np.ndarray, ties: str) -> list[float]:
    ranks = []
    for b, row in enumerate(targets):
        allowed = [i for i in range(scores.shape[1]) if eligible[b, i] and i not in exclude[b]]
        for target in row:
            if target not in allowed:
                ranks.append(np.inf)
                continue
            # Place the target first and last among its equals.
            best = 1 + sum(scores[b, i] > scores[b, target] for i in allowed)
            worst = sum(scores[b, i] >= scores[b, target] for i in allowed)
            ranks.append({"average": (best + worst) / 2, "pessimistic": worst, "optimistic": best}[ties])
    return ranks


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, list[list[int]], list[list[int]], np.ndarray]:
    b, n = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    items = st.lists(st.integers(0, n - 1), max_size=n)
    value = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0])
    scores = np.array(draw(st.lists(st.lists(value, min_size=n, max_size=n), min_size=b, max_size=b)), np.float32)
    targets, exclude = (draw(st.lists(items, min_size=b, max_size=b)) for _ in range(2))
    eligible = np.array(draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=b, max_size=b)))
    return scores, targets, exclude, eligible


@given(cases(), st.sampled_from(["average", "pessimistic", "optimistic"]), st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_equals_brute_force(case: tuple, ties: str, budget: int) -> None:
    scores, targets, exclude, eligible = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_ranking, "_BUDGET", budget)  # chunks of one target and of several
        ranks = target_ranks(scores, jagged(targets), jagged(exclude), eligible, ties)  # type: ignore[arg-type]
    assert ranks.tolist() == brute(scores, targets, exclude, eligible, ties)


def test_the_place_in_a_sorted_list() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20, 300)).astype(np.float32)
    target = rng.integers(300, size=20)
    order = np.argsort(-scores, axis=1)
    assert target_ranks(scores, target).tolist() == [order[b].tolist().index(target[b]) + 1 for b in range(20)]
    assert target_ranks(torch.from_numpy(scores), target).tolist() == target_ranks(scores, target).tolist()


def test_a_constant_scorer_is_at_chance_level() -> None:
    n, k, events = 50, 10, 4000
    scores = np.zeros((events, n))
    targets = np.random.default_rng(1).integers(n, size=events)
    assert (target_ranks(scores, targets) == (n + 1) / 2).all()
    assert (target_ranks(scores, targets, ties="pessimistic") == n).all()
    ranks = target_ranks(scores, targets, ties="random", rng=np.random.default_rng(2))
    assert np.bincount(ranks.astype(int), minlength=n + 1)[1:].min() > 0
    discounts = 1 / np.log2(1 + np.arange(1, n + 1))
    for values, chance in (
        (recall_at(ranks, k), k / n),
        (ndcg_at(ranks, k), discounts[:k].sum() / n),
        (mrr(ranks), (1 / np.arange(1, n + 1)).mean()),
    ):
        assert abs(values.mean() - chance) < 4 * values.std() / np.sqrt(events)


def test_chance_level_is_among_what_may_be_recommended() -> None:
    eligible = np.arange(10) < 6
    ranks = target_ranks(np.zeros((1, 10)), np.array([5]), jagged([[0, 1, 1, 9]]), eligible)
    assert ranks.tolist() == [(4 + 1) / 2]  # 2, 3, 4 and 5 are left


def test_a_target_that_may_not_be_recommended_is_a_miss() -> None:
    scores = np.array([[3.0, 2.0, 1.0]])
    ranks = target_ranks(scores, jagged([[0, 1, 2]]), jagged([[0]]), np.array([True, True, False]))
    assert ranks.tolist() == [np.inf, 1, np.inf]
    assert recall_at(ranks, 3).tolist() == [0, 1, 0]


def test_an_item_that_cannot_be_scored_ties_with_its_like() -> None:
    scores = np.array([[1.0, -np.inf, -np.inf, 2.0]])
    assert target_ranks(scores, jagged([[1, 0]])).tolist() == [3.5, 2]


def test_errors() -> None:
    scores = np.zeros((2, 3))
    with pytest.raises(ValueError, match="targets: expected catalogue rows from 0 to 2, got 3"):
        target_ranks(scores, np.array([0, 3]))
    with pytest.raises(ValueError, match="exclude: expected catalogue rows from 0 to 2, got -1"):
        target_ranks(scores, np.array([0, 1]), jagged([[-1], []]))
    with pytest.raises(ValueError, match="exclude: expected 3 offsets that rise from 0 to 1"):
        target_ranks(scores, np.array([0, 1]), jagged([[1]]))
    with pytest.raises(ValueError, match=r"targets: expected one for each of the 2 rows, got the shape \(3,\)"):
        target_ranks(scores, np.array([0, 1, 2]))
    with pytest.raises(ValueError, match=r"eligible: expected bool \(3,\) or \(2, 3\), got bool \(2,\)"):
        target_ranks(scores, np.array([0, 1]), eligible=np.ones(2, bool))
    with pytest.raises(ValueError, match="scores: expected numbers, got NaN"):
        target_ranks(np.array([[np.nan]]), np.array([0]))
    with pytest.raises(ValueError, match="scores: expected two axes"):
        target_ranks(np.zeros(3), np.array([0]))
    with pytest.raises(ValueError, match="ties: expected one of average, pessimistic, optimistic, random, got 'mean'"):
        target_ranks(scores, np.array([0, 1]), ties="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ties 'random': expected rng"):
        target_ranks(scores, np.array([0, 1]), ties="random")
