# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from recsys.core.errors import ConfigError, DataError
from recsys.retrieval.catalogue import BeamIndex, Catalogue, CatalogueView, GatherIndex
from recsys.retrieval.catalogue.beam_search import BeamSearch, Open, alive_of
from recsys.retrieval.catalogue.index import Excluded
from recsys.retrieval.catalogue.trie import CodeTrie
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.state import EncoderMemory, SlotLogProbs

State = SlotLogProbs | EncoderMemory
KINDS = ["slots", "chain"]


class Chain:
    """A code depends on the one before it. The memory has a position for each level and code before it, which holds the log-probabilities.

    Args:
        values_bsv: float ``[B, L * V, V]``; at the first level, the code before is 0.
    """

    def __init__(self, values_bsv: Tensor, valid_bs: Tensor) -> None:
        assert bool(valid_bs.all())
        self._levels = iter(values_bsv.unflatten(1, (-1, values_bsv.shape[2])).unbind(1))
        self._beams = 0

    def step(self, parents_bw: Tensor, codes_bw: Tensor) -> Tensor:
        assert codes_bw.numel() and bool((parents_bw >= -int(not self._beams)).all()) and bool((parents_bw < self._beams).all())
        self._beams = codes_bw.shape[1]
        return torch.stack([level[codes] for level, codes in zip(next(self._levels), codes_bw.clamp(min=0), strict=True)])


def chain(values: np.ndarray | Tensor) -> EncoderMemory:
    values = torch.as_tensor(values)
    return EncoderMemory(values, torch.ones(values.shape[:2], dtype=torch.bool), "t", Chain)


def slots(values: np.ndarray | Tensor) -> SlotLogProbs:
    return SlotLogProbs(torch.as_tensor(values), "t")


def drawn(kind: str, users: int, sizes: list[int], draw: Callable[[tuple[int, ...]], np.ndarray]) -> State:
    """What ``draw`` draws, as float32 log-probabilities of either kind."""
    widest = max(sizes)
    shape = (users, len(sizes), widest) if kind == "slots" else (users, len(sizes) * widest, widest)
    return (slots if kind == "slots" else chain)(draw(shape).astype(np.float32))


def normal(kind: str, seed: int, users: int, sizes: list[int]) -> State:
    """Log-probabilities with no two sums alike."""
    rng = np.random.default_rng(seed)
    return drawn(kind, users, sizes, lambda shape: np.log(rng.dirichlet(np.ones(shape[-1]), shape[:-1])))


def alone(state: State, user: int) -> State:
    one = replace(state, values=state.values[user : user + 1])
    return replace(one, valid=one.valid[user : user + 1]) if isinstance(one, EncoderMemory) else one


def scores_of(state: State, codes: np.ndarray) -> np.ndarray:
    """float32 ``[B, N]``: every item's score, level after level."""
    values, scores = state.values.numpy(), np.zeros((len(state.values), len(codes)), np.float32)
    before = np.zeros(len(codes), np.int64)
    for level in range(codes.shape[1]):
        where = level if isinstance(state, SlotLogProbs) else level * values.shape[2] + before
        scores += values[:, where, codes[:, level]]
        before = codes[:, level]
    return scores


def catalogue_of(live: np.ndarray) -> CatalogueView:
    catalogue = Catalogue([f"i{i}" for i in range(len(live))])
    catalogue.set_live([f"i{i}" for i in np.flatnonzero(~live)], False)
    return catalogue.snapshot()


def table_of(codes: np.ndarray, sizes: Any) -> CodeTable:
    return CodeTable(torch.from_numpy(codes).long(), tuple(sizes), "t")


def build(codes: np.ndarray, sizes: Any, view: CatalogueView, **options: Any) -> BeamIndex:
    return BeamIndex.build(BeamIndex.Config(**options), table_of(codes, sizes), view)


def distinct_codes(rng: np.random.Generator, n: int, sizes: Any) -> np.ndarray:
    chosen = rng.choice(int(np.prod(sizes)), n, replace=False)
    return np.stack(np.unravel_index(chosen, sizes), 1)


def jagged(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([v for one in lists for v in one], np.int64), np.cumsum([0, *map(len, lists)])


def brute(scores: np.ndarray, k: int, allowed: np.ndarray, exclude: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """One list at a time, by a stable sort; -inf is no score."""
    rows, best = np.full((len(scores), k), -1), np.full((len(scores), k), -np.inf, np.float32)
    for b, excluded in enumerate(exclude):
        order = [i for i in np.argsort(-scores[b], kind="stable") if allowed[i] and i not in set(excluded) and scores[b, i] > -np.inf][:k]
        rows[b, : len(order)] = order
        best[b, : len(order)] = scores[b, order]
    return rows, best


@st.composite
def requests(draw: st.DrawFn, kinds: list[str] = KINDS) -> tuple[np.ndarray, list[int], State, np.ndarray, list[list[int]]]:
    """Codes with duplicates, level sizes, a state of halves (exact sums, many ties, some -inf), live bits, and exclusions,
    which close whole branches for some users."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    n, users = draw(st.integers(1, 40)), draw(st.integers(0, 5))
    codes = rng.integers(0, sizes, (n, len(sizes)))
    spread, masked = draw(st.sampled_from([0, 2, 100])), draw(st.sampled_from([0.0, 0.3]))

    def halves(shape: tuple[int, ...]) -> np.ndarray:
        return np.where(rng.random(shape) < masked, -np.inf, rng.integers(-spread, 1, shape) / 2)

    state = drawn(draw(st.sampled_from(kinds)), users, sizes, halves)
    live = rng.random(n) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    most = draw(st.sampled_from([0, 3, n]))
    exclude = [rng.integers(-1, n, rng.integers(0, most + 1)).tolist() for _ in range(users)]
    for own in exclude:
        if rng.random() < 0.3:
            own += np.flatnonzero(codes[:, 0] == codes[rng.integers(n), 0]).tolist()
    return codes, sizes, state, live, exclude


@given(requests(), st.sampled_from([1, 2, 7, 50]))
@settings(max_examples=80, deadline=None)
def test_beams_that_are_wide_enough_find_what_brute_force_finds(request_: Any, k: int) -> None:
    codes, sizes, state, live, exclude = request_
    view = catalogue_of(live)
    rows, scores = build(codes, sizes, view).search(state, k, view, jagged(exclude))
    expected_rows, expected_scores = brute(scores_of(state, codes), k, live, exclude)
    assert rows.dtype == np.int64 and scores.dtype == np.float32
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)
    if isinstance(state, SlotLogProbs):
        gather = GatherIndex.build(GatherIndex.Config(), table_of(codes, sizes), view)
        for ours, theirs in zip((rows, scores), gather.search(state, k, view, jagged(exclude)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


SCHEDULES = st.sampled_from([{"width": 1}, {"width": 2}, {"width": 3, "children": 1}, {"width": 4, "children": 2}, "recgpt"])


@given(requests(), st.sampled_from([1, 3, 8, 50]), SCHEDULES, st.booleans())
@settings(max_examples=150, deadline=None)
def test_k_items_come_back_wherever_they_exist_however_narrow_the_beams(request_: Any, k: int, schedule: Any, renormalise: bool) -> None:
    codes, sizes, state, live, exclude = request_
    view = catalogue_of(live)
    if schedule == "recgpt":
        schedule = {"widths": (10, *[20] * (len(sizes) - 1)), "children": 5}
    index = build(codes, sizes, view, renormalise=renormalise, **schedule)
    rows, scores = index.search(state, k, view, jagged(exclude))
    all_scores = scores_of(state, codes)
    everything, _ = brute(all_scores, len(codes), live, exclude)
    exact = brute(all_scores, 1, live, exclude)[1][:, 0]
    for user, (own, score) in enumerate(zip(rows, scores, strict=True)):
        possible = set(everything[user]) - {-1}
        count = min(k, len(possible))
        found = own[:count].tolist()
        assert set(found) <= possible and len(set(found)) == count and (own[count:] == -1).all() and np.isneginf(score[count:]).all()
        assert sorted(range(count), key=lambda i: (-score[i], found[i])) == list(range(count))
        if not renormalise:
            np.testing.assert_array_equal(score[:count], all_scores[user, found])
            assert score[0] <= exact[user]


@given(requests(), SCHEDULES, st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_user_alone_gets_the_very_same_answer(request_: Any, schedule: Any, renormalise: bool) -> None:
    """Also where the beams are widened for a batch mate who lacks items."""
    codes, sizes, state, live, exclude = request_
    view = catalogue_of(live)
    schedule = {"width": 5} if schedule == "recgpt" else schedule
    index = build(codes, sizes, view, renormalise=renormalise, **schedule)
    rows, scores = index.search(state, 4, view, jagged(exclude))
    for user in range(len(rows)):
        own_rows, own_scores = index.search(alone(state, user), 4, view, jagged(exclude[user : user + 1]))
        assert own_rows.tolist() == rows[user : user + 1].tolist()
        assert own_scores.tobytes() == scores[user : user + 1].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_widening_for_one_user_leaves_the_others_as_they_are(kind: str) -> None:
    rng, sizes = np.random.default_rng(0), [6, 6, 6]
    codes = distinct_codes(rng, 80, sizes)
    view, state = catalogue_of(np.ones(80, bool)), normal(kind, 0, 8, sizes)
    index = build(codes, sizes, view, width=3)
    few = [[], *[np.flatnonzero(codes[:, 0] != user % 6).tolist() for user in range(1, 8)]]
    together, _ = index.search(state, 3, view, jagged(few))
    assert (together >= 0).all()
    state.values[1] = -torch.inf  # finds nothing at any width
    again, scores = index.search(state, 3, view, jagged(few))
    assert again[1].tolist() == [-1] * 3 and np.isneginf(scores[1]).all()
    assert np.delete(again, 1, 0).tolist() == np.delete(together, 1, 0).tolist()


@pytest.mark.parametrize("width", [4, 500])
@pytest.mark.parametrize("kind", KINDS)
def test_other_ids_give_the_same_items(kind: str, width: int) -> None:
    rng, sizes = np.random.default_rng(1), [7, 4, 6]
    codes, place, live = distinct_codes(rng, 90, sizes), rng.permutation(90), rng.random(90) < 0.8
    state, exclude = normal(kind, 1, 6, sizes), [rng.integers(0, 90, 9).tolist() for _ in range(6)]
    permuted = np.argsort(place)  # the item of row r stands at row place[r]
    view, other_view = catalogue_of(live), catalogue_of(live[permuted])
    rows, scores = build(codes, sizes, view, width=width).search(state, 4, view, jagged(exclude))
    others, other_scores = build(codes[permuted], sizes, other_view, width=width).search(
        state, 4, other_view, jagged([place[own].tolist() for own in exclude])
    )
    np.testing.assert_array_equal(place[rows], others)
    np.testing.assert_array_equal(scores, other_scores)


@pytest.mark.parametrize("kind", KINDS)
def test_retiring_an_item_takes_out_that_item_alone_and_bringing_it_back_restores_it(kind: str) -> None:
    rng, sizes = np.random.default_rng(2), [4, 3, 5]
    codes = rng.integers(0, sizes, (50, 3))
    catalogue = Catalogue([f"i{i}" for i in range(50)])
    index, state = build(codes, sizes, catalogue.snapshot(), width=60), normal(kind, 2, 5, sizes)
    before = index.search(state, 10, catalogue.snapshot())
    gone = int(before[0][2, 3])
    catalogue.set_live([f"i{gone}"], False)
    longer, _ = index.search(state, 11, Catalogue([f"i{i}" for i in range(50)]).snapshot())
    after, _ = index.search(state, 10, catalogue.snapshot())
    assert after.tolist() == [[row for row in own if row != gone][:10] for own in longer.tolist()]
    catalogue.set_live([f"i{gone}"], True)
    for one, other in zip(index.search(state, 10, catalogue.snapshot()), before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_forgets_what_was_live_before(kind: str) -> None:
    """With narrow beams, and probabilities over what may be recommended, as one that was never asked before."""
    rng, sizes = np.random.default_rng(10), [4, 3, 5]
    codes, state = rng.integers(0, sizes, (50, 3)), normal(kind, 10, 5, sizes)
    views = [catalogue_of(rng.random(50) < 0.4) for _ in range(3)]
    index = build(codes, sizes, views[0], width=3, renormalise=True)
    for view in views:
        scorable = rng.random(50) < 0.5
        for mask in (None, scorable, ~scorable):
            fresh = build(codes, sizes, view, width=3, renormalise=True)
            for one, other in zip(index.search(state, 3, view, None, mask), fresh.search(state, 3, view, None, mask), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_an_extended_index_is_one_built_of_everything_and_the_old_one_stays(kind: str) -> None:
    rng, sizes = np.random.default_rng(3), [4, 3, 5]
    codes = rng.integers(0, sizes, (70, 3))
    catalogue = Catalogue([f"i{i}" for i in range(50)])
    old_view, state = catalogue.snapshot(), normal(kind, 3, 5, sizes)
    old = build(codes[:50], sizes, old_view, width=8)
    before = old.search(state, 7, old_view)
    catalogue.add([f"i{i}" for i in range(50, 70)])
    view = catalogue.snapshot()
    new = old.extended(table_of(codes, sizes), view)
    whole = build(codes, sizes, view, width=8)
    assert new.meta == whole.meta
    for one, other in zip(new.search(state, 7, view), whole.search(state, 7, view), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(old.search(state, 7, old_view), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_equal_scores_are_cut_by_codes_and_listed_by_rows() -> None:
    """Rows 0 and 1 have the largest codes; two beams of four equal ones keep rows 2 and 3, and then 3 before 2 by nothing but rows."""
    codes, view = np.array([[3, 0], [2, 0], [1, 0], [0, 0], [1, 0]]), catalogue_of(np.ones(5, bool))
    state = slots(np.full((1, 2, 4), -1, np.float32))
    assert build(codes, (4, 1), view, width=2).search(state, 2, view)[0].tolist() == [[2, 3]]
    assert build(codes, (4, 1), view, width=2).search(state, 3, view)[0].tolist() == [[2, 3, 4]]
    assert build(codes, (4, 1), view, width=4).search(state, 5, view)[0].tolist() == [[0, 1, 2, 3, 4]]


def run(codes: np.ndarray, sizes: Any, state: State, widths: Any, children: int | None = None) -> list[list[list[int]]]:
    """The codes at the leaves that one search reaches, best first."""
    trie = CodeTrie.build(codes, sizes)
    nothing = np.zeros(0, np.int64)
    counts = trie.counts(np.ones(len(codes), bool))
    where = Open.of(trie, counts, alive_of(counts), Excluded(nothing, nothing))
    leaves, scores, _ = BeamSearch(trie, where, False).run(state.begin(), np.arange(len(state.values)), widths, children)
    first = codes[trie.order[trie.starts[-1][:-1]]]
    return [first[own[score > -np.inf]].tolist() for own, score in zip(leaves.numpy(), scores.numpy(), strict=True)]


def test_a_beam_has_no_more_children_than_it_may_have() -> None:
    """Of equal ones the smaller codes."""
    codes = np.stack(np.unravel_index(np.arange(27), (3, 3, 3)), 1)
    assert run(codes, (3, 3, 3), slots(np.zeros((1, 3, 3), np.float32)), (9, 9, 9), children=1) == [[[0, 0, 0]]]
    values = np.array([[[-1, -2, -1], [-3, -3, -3], [-2, -1, -1]]], np.float32)
    assert sorted(run(codes, (3, 3, 3), slots(values), (9, 9, 9), children=2)[0]) == sorted(
        [one, two, three] for one in (0, 2) for two in (0, 1) for three in (1, 2)
    )
    assert len(run(codes, (3, 3, 3), slots(values), (9, 9, 99), children=3)[0]) == 27


def test_wider_beams_can_lose_the_best_item_but_all_beams_never_do() -> None:
    """Beam search is not monotone in its width: the second beam's children may crowd out the first one's, which pays in the end."""
    codes = np.array([[0, 0, 2], [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]])
    view, values = catalogue_of(np.ones(5, bool)), np.full((1, 9, 3), -3, np.float32)
    values[0, 0, :2] = -0.5, -0.9  # the first code
    values[0, 3, 0], values[0, 4, :2] = -1.5, (-0.9, -0.9)  # the second, after 0 and after 1
    values[0, 6, 2] = -0.1  # the third, after 0
    best = [build(codes, (2, 2, 3), view, width=width).search(chain(values), 1, view)[1].item() for width in (1, 2, 3)]
    np.testing.assert_allclose(best, [-2.1, -4.8, -2.1], rtol=1e-6)


@given(requests(), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_no_list_gets_worse_where_only_the_last_level_is_widened(request_: Any, width: int, more: int) -> None:
    codes, sizes, state, live, _ = request_
    view = catalogue_of(live)
    widths = (max(2, width),) * len(sizes)
    _, narrow = build(codes, sizes, view, widths=widths).search(state, 2, view)
    _, wide = build(codes, sizes, view, widths=(*widths[:-1], widths[-1] + more)).search(state, 2, view)
    assert (wide >= narrow).all()


@pytest.mark.parametrize("kind", KINDS)
def test_renormalised_probabilities_sum_to_one_over_the_catalogue(kind: str) -> None:
    """Whatever of it may be recommended: a score does not depend on that, and is what `score` gives."""
    rng, sizes = np.random.default_rng(4), [5, 4, 6]
    codes, live = distinct_codes(rng, 70, sizes), rng.random(70) < 0.6
    view, state = catalogue_of(live), normal(kind, 4, 6, sizes)
    everything, index = list(range(70)), build(codes, sizes, catalogue_of(np.ones(70, bool)), width=100, renormalise=True)
    scores = index.score(state, np.tile(np.arange(70), (6, 1)))
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, rtol=1e-5)
    for user in range(6):
        expected = [level_by_level(state, user, codes, everything, row) for row in everything]
        np.testing.assert_allclose(scores[user], expected, rtol=1e-4)
    exclude = [np.flatnonzero((codes[:, 0] == user % 5) | (rng.random(70) < 0.1)).tolist() for user in range(6)]
    rows, found = index.search(state, 70, view, jagged(exclude))
    for user in range(6):
        assert sorted(rows[user][rows[user] >= 0]) == [row for row in np.flatnonzero(live) if row not in exclude[user]]
        np.testing.assert_allclose(found[user][rows[user] >= 0], scores[user][rows[user][rows[user] >= 0]], rtol=1e-5)


def level_by_level(state: State, user: int, codes: np.ndarray, possible: list[int], row: int) -> float:
    """The score of an item whose every code is drawn among those that lead to one of the items."""
    values, score, before = state.values[user].double().numpy(), 0.0, 0
    for level, code in enumerate(codes[row]):
        follow = {int(codes[other, level]) for other in possible if (codes[other, :level] == codes[row, :level]).all()}
        log_probs = values[level] if isinstance(state, SlotLogProbs) else values[level * values.shape[1] + before]
        score += log_probs[code] - np.log(np.exp(log_probs[sorted(follow)]).sum())
        before = code
    return score


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_given_items_are_the_models_own(kind: str) -> None:
    rng, sizes = np.random.default_rng(5), [5, 4, 6]
    codes = rng.integers(0, sizes, (40, 3))
    view, state = catalogue_of(np.arange(40) > 5), normal(kind, 5, 4, sizes)
    index, rows = build(codes, sizes, view), rng.integers(-1, 40, (4, 7))
    expected = np.take_along_axis(scores_of(state, codes), np.maximum(rows, 0), 1)
    expected[rows < 0] = -np.inf
    scores = index.score(state, rows)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert index.score(state, rows[:, :0]).shape == (4, 0)
    everything = np.where(view.live, scores_of(state, codes), -np.inf)
    partition = np.log(np.exp(everything).sum(axis=1)) if isinstance(state, SlotLogProbs) else np.zeros(4)
    np.testing.assert_allclose(index.log_partition(state, view), partition, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_states_in_training_and_of_other_kinds_of_floats_are_understood(kind: str) -> None:
    rng, sizes = np.random.default_rng(6), [5, 4, 6]
    codes = rng.integers(0, sizes, (40, 3))
    view, state = catalogue_of(np.ones(40, bool)), normal(kind, 6, 4, sizes)
    index, rows = build(codes, sizes, view), np.zeros((4, 1), np.int64)
    half = replace(state, values=state.values.bfloat16())
    expected = (*index.search(replace(half, values=half.values.float()), 5, view), index.score(half, rows))
    learning = replace(half, values=half.values.float().requires_grad_())
    for one, other in zip(expected, (*index.search(learning, 5, view), index.score(learning, rows)), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(expected, index.search(half, 5, view), strict=False):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_not_of_log_probabilities_is_an_error(kind: str, bad: float) -> None:
    sizes = [5, 4, 6]
    codes, view = np.random.default_rng(7).integers(0, sizes, (40, 3)), catalogue_of(np.ones(40, bool))
    index, state = build(codes, sizes, view), normal(kind, 7, 4, sizes)
    state.values[2, -1] = bad
    state.values[2, 2] = bad
    state.values[2, 12:] = bad
    for ask in (lambda: index.search(state, 3, view), lambda: index.score(state, np.zeros((4, 1), np.int64))):
        with pytest.raises(DataError, match=r"state: row 2: .*NaN or infinity"):
            ask()


def test_states_of_another_shape_are_an_error() -> None:
    codes, view = np.zeros((3, 2), np.int64), catalogue_of(np.ones(3, bool))
    index = build(codes, (4, 6), view)
    for shape in ((2, 3, 6), (2, 2, 5), (2, 6)):
        with pytest.raises(ConfigError, match=r"state: expected \[B, 2, 6\] log-probabilities"):
            index.search(slots(np.zeros(shape, np.float32)), 1, view)
    wider = np.full((2, 2, 9), np.nan, np.float32)  # what stands beyond a level's size is never read
    wider[:, 0, :4] = wider[:, 1, :6] = -1
    assert index.search(slots(wider), 3, view)[0].tolist() == [[0, 1, 2]] * 2
    with pytest.raises(ConfigError, match=r"level 1 .* 6 codes, got log-probabilities of 5"):
        index.search(chain(np.zeros((2, 10, 5), np.float32)), 1, view)
    with pytest.raises(ConfigError, match=r"level 1 .* 6 codes, got log-probabilities of 5"):
        index.score(chain(np.zeros((2, 10, 5), np.float32)), np.zeros((2, 1), np.int64))


def test_there_is_a_width_for_each_level() -> None:
    view = catalogue_of(np.ones(2, bool))
    for widths in ((3,), (3, 3, 3), (3, 0)):
        with pytest.raises(ConfigError, match=r"widths: expected 2 of at least 1"):
            build(np.zeros((2, 2), np.int64), (1, 1), view, widths=widths)


# --- against transformers

T5_SIZES, PAD, FIRST = (6, 7, 5), 0, 2


class T5Scorer:
    """The whole prefix anew at each step. As in transformers, probabilities are over the whole vocabulary."""

    def __init__(self, model: T5ForConditionalGeneration, memory_bsd: Tensor, valid_bs: Tensor) -> None:
        self._model, self._memory, self._valid = model, memory_bsd, valid_bs
        self._tokens = torch.full((len(memory_bsd), 1, 1), PAD)  # [B, W, t]

    def step(self, parents_bw: Tensor, codes_bw: Tensor) -> Tensor:
        level, beams = self._tokens.shape[2] - 1, codes_bw.shape[1]
        if bool((codes_bw >= 0).all()):
            kept = self._tokens.take_along_dim(parents_bw[..., None], 1)
            self._tokens = torch.cat((kept, (codes_bw + OFFSETS[level])[..., None]), 2)
            level += 1
        logits = self._model(
            encoder_outputs=BaseModelOutput(self._memory.repeat_interleave(beams, 0)),
            attention_mask=self._valid.long().repeat_interleave(beams, 0),
            decoder_input_ids=self._tokens.flatten(0, 1),
        ).logits[:, -1]
        own = logits.log_softmax(-1)[:, OFFSETS[level] : OFFSETS[level] + T5_SIZES[level]]
        return functional.pad(own, (0, max(T5_SIZES) - own.shape[1])).unflatten(0, codes_bw.shape)


OFFSETS = [FIRST + sum(T5_SIZES[:level]) for level in range(len(T5_SIZES))]


@pytest.fixture(scope="module")
def t5() -> T5ForConditionalGeneration:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=FIRST + sum(T5_SIZES),
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            pad_token_id=PAD,
            decoder_start_token_id=PAD,
            initializer_factor=3.0,
        )
        return T5ForConditionalGeneration(config).eval()


def histories() -> tuple[Tensor, Tensor]:
    """Tokens ``[B, S]`` of histories of several lengths, and where they are."""
    generator = torch.Generator().manual_seed(1)
    valid = torch.arange(9) < torch.tensor([9, 4, 1, 6])[:, None]
    return torch.randint(FIRST, FIRST + sum(T5_SIZES), (4, 9), generator=generator) * valid, valid


def memory_of(model: T5ForConditionalGeneration, tokens: Tensor, valid: Tensor) -> EncoderMemory:
    with torch.no_grad():
        values = model.get_encoder()(tokens, attention_mask=valid.long()).last_hidden_state
    return EncoderMemory(values, valid, "t", lambda memory, valid: T5Scorer(model, memory, valid))


@pytest.mark.parametrize("width", [1, 3, 5])
def test_transformers_constrained_beam_search_finds_the_same(t5: T5ForConditionalGeneration, width: int) -> None:
    rng = np.random.default_rng(8)
    codes, live = distinct_codes(rng, 90, T5_SIZES), rng.random(90) < 0.8
    exclude = [rng.integers(0, 90, 12).tolist() for _ in range(4)]
    tokens, valid = histories()
    prefixes: list[dict[tuple[int, ...], list[int]]] = []  # of each user: what may follow
    for own in exclude:
        follow: dict[tuple[int, ...], set[int]] = {}
        for row in set(np.flatnonzero(live).tolist()) - set(own):
            item = [int(code) + offset for code, offset in zip(codes[row], OFFSETS, strict=True)]
            for level in range(len(item)):
                follow.setdefault(tuple(item[:level]), set()).add(item[level])
        prefixes.append({prefix: sorted(children) for prefix, children in follow.items()})

    found = t5.generate(
        input_ids=tokens,
        attention_mask=valid.long(),
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=len(T5_SIZES),
        do_sample=False,
        length_penalty=0.0,
        early_stopping=False,
        eos_token_id=None,
        prefix_allowed_tokens_fn=lambda user, sequence: prefixes[user][tuple(sequence[1:].tolist())],
        return_dict_in_generate=True,
        output_scores=True,
    )
    row_of = {tuple(item): row for row, item in enumerate(codes.tolist())}
    theirs = [row_of[tuple(item)] for item in (found.sequences[:, 1:] - torch.tensor(OFFSETS)).tolist()]

    view, state = catalogue_of(live), memory_of(t5, tokens, valid)
    rows, scores = build(codes, T5_SIZES, view, width=width).search(state, width, view, jagged(exclude))
    assert rows.tolist() == np.reshape(theirs, (4, width)).tolist()
    if width > 1:  # a greedy search says no score
        np.testing.assert_allclose(scores, found.sequences_scores.reshape(4, width).numpy(), atol=1e-4)
    np.testing.assert_allclose(build(codes, T5_SIZES, view).score(state, rows), scores, atol=1e-4)


def test_padding_and_batch_mates_do_not_matter_to_generated_items(t5: T5ForConditionalGeneration) -> None:
    codes, view = distinct_codes(np.random.default_rng(9), 90, T5_SIZES), catalogue_of(np.ones(90, bool))
    tokens, valid = histories()
    index = build(codes, T5_SIZES, view, width=6)
    rows, scores = index.search(memory_of(t5, tokens, valid), 6, view)
    for user in range(4):
        length = int(valid[user].sum())
        own = memory_of(t5, tokens[user : user + 1, :length], valid[user : user + 1, :length])
        own_rows, own_scores = index.search(own, 6, view)
        assert own_rows.tolist() == rows[user : user + 1].tolist()
        np.testing.assert_allclose(own_scores, scores[user : user + 1], atol=1e-4)
