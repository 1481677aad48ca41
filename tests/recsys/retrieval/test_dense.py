# SPDX-License-Identifier: Apache-2.0
import shutil
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import JaggedTensor

from recsys.core import components
from recsys.core.errors import BundleError, ConfigError, DataError
from recsys.core.files import read_json, write_json
from recsys.data.batch import SequenceBatch
from recsys.retrieval.base import Retriever, VectorRetriever
from recsys.retrieval.catalogue import Catalogue, CatalogueView, DenseIndex, check_pair
from recsys.retrieval.catalogue.topk import best, keys_of
from recsys.retrieval.state import SlotVectors


def catalogue_of(n: int, dead: np.ndarray | None = None) -> CatalogueView:
    catalogue = Catalogue([f"i{i}" for i in range(n)])
    if dead is not None:
        catalogue.set_live([f"i{i}" for i in np.flatnonzero(dead)], False)
    return catalogue.snapshot()


def build(vectors: np.ndarray, view: CatalogueView | None = None, model_hash: str = "m") -> DenseIndex:
    return DenseIndex.build(DenseIndex.Config(), vectors, view or catalogue_of(len(vectors)), content_hash=model_hash)


def grown(index: DenseIndex, vectors: np.ndarray, view: CatalogueView | None = None) -> DenseIndex:
    """The index with the rows that it lacks of these."""
    return index.extended(vectors[index.meta.rows :], view or catalogue_of(len(vectors)))


def state_of(queries: np.ndarray, slots: int = 1) -> SlotVectors:
    return SlotVectors(torch.from_numpy(queries).unflatten(1, (slots, -1)))


def jagged(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([v for one in lists for v in one], np.int64), np.cumsum([0, *map(len, lists)])


def brute(scores: np.ndarray, k: int, allowed: np.ndarray, exclude: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """One list at a time, by a stable sort."""
    rows, best = np.full((len(scores), k), -1), np.full((len(scores), k), -np.inf, np.float32)
    for b, excluded in enumerate(exclude):
        order = [i for i in np.argsort(-scores[b], kind="stable") if allowed[i] and i not in set(excluded)][:k]
        rows[b, : len(order)] = order
        best[b, : len(order)] = scores[b, order]
    return rows, best


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_search_against_brute_force(data: st.DataObject) -> None:
    """Small integers: every score is exact whatever the order of summation, and most lists are full of ties."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, b, slots = draw(st.integers(1, 200)), draw(st.integers(0, 25)), draw(st.integers(1, 3))
    spread = draw(st.sampled_from([0, 1, 100]))
    vectors = rng.integers(-spread, spread + 1, (n, slots * 2)).astype(np.float32)
    queries = rng.integers(-spread, spread + 1, (b, slots * 2)).astype(np.float32)
    live = rng.random(n) < draw(st.sampled_from([0.0, 0.02, 0.5, 0.9, 1.0]))
    scorable = rng.random(n) < draw(st.sampled_from([0.3, 1.0])) if draw(st.booleans()) else None
    most = draw(st.sampled_from([0, 3, n]))
    exclude = [rng.integers(-1, n, rng.integers(0, most + 1)).tolist() for _ in range(b)]
    k = draw(st.sampled_from([1, 2, 7, n, n + 3]))

    view = catalogue_of(n, ~live)
    index = build(vectors, view)
    rows, scores = index.search(state_of(queries, slots), k, view, jagged(exclude), scorable)

    expected_rows, expected_scores = brute(queries @ vectors.T, k, live if scorable is None else live & scorable, exclude)
    assert rows.dtype == np.int64 and scores.dtype == np.float32
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_an_index_that_grew_against_brute_force(data: st.DataObject) -> None:
    """As above: ties within the main part, within the delta, and between them."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = np.cumsum([draw(st.integers(0, 200)), *draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))]).tolist()
    n, b = steps[-1], draw(st.integers(1, 9))
    spread = draw(st.sampled_from([0, 1, 100]))
    vectors = rng.integers(-spread, spread + 1, (n, 4)).astype(np.float32)
    queries = rng.integers(-spread, spread + 1, (b, 4)).astype(np.float32)
    live = rng.random(n) < draw(st.sampled_from([0.02, 0.5, 0.9, 1.0]))
    scorable = rng.random(n) < 0.5 if draw(st.booleans()) else None
    most = draw(st.sampled_from([0, 3, n]))
    exclude = [rng.integers(-1, n, rng.integers(0, most + 1)).tolist() if n else [] for _ in range(b)]
    k = draw(st.sampled_from([1, 2, 7, n + 3]))

    view, config = catalogue_of(n, ~live), DenseIndex.Config(delta=draw(st.sampled_from([0, 0.1, 100])))
    index = DenseIndex.build(config, vectors[: steps[0]], catalogue_of(steps[0]), content_hash="m")
    for rows_then in steps[1:]:
        index = grown(index, vectors[:rows_then], view if rows_then == n else None)
    found = index.search(state_of(queries, 2), k, view, jagged(exclude), scorable)

    anew = build(vectors, view)
    expected = brute(queries @ vectors.T, k, live if scorable is None else live & scorable, exclude)
    for rows_and_scores in (found, anew.search(state_of(queries, 2), k, view, jagged(exclude), scorable)):
        for ours, theirs in zip(rows_and_scores, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    listed = rng.integers(-1, n, (b, 30))
    np.testing.assert_array_equal(index.score(state_of(queries, 2), listed), anew.score(state_of(queries, 2), listed))
    ours, theirs = (which.log_partition(state_of(queries, 2), view, scorable) for which in (index, anew))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("main", [2400, 2403])
@pytest.mark.parametrize("live_share", [1.0, 0.5])
def test_faiss_answers_for_main_part_and_delta(live_share: float, main: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The delta need not begin where a byte of the live bits does."""
    rng = np.random.default_rng(8)
    n, b, k = 3000, 40, 10
    vectors, queries = rng.normal(size=(n, 12)).astype(np.float32), rng.normal(size=(b, 12)).astype(np.float32)
    live = rng.random(n) < live_share
    view = catalogue_of(n, ~live)
    index = DenseIndex.build(DenseIndex.Config(delta=0.5), vectors[:main], catalogue_of(main), content_hash="m")
    index = grown(grown(index, vectors[: main + 55]), vectors, view)
    scores64 = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    exclude = [np.argsort(-scores64[i])[: i % 7].tolist() for i in range(b)]
    monkeypatch.setattr(index, "_search_all", lambda *_: pytest.fail("computed all scores"))
    rows, scores = index.search(state_of(queries, 3), k, view, jagged(exclude))
    expected_rows, expected_scores = brute(scores64, k, live, exclude)
    assert (rows < main).any() and (rows >= main).any()
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)


def test_ties_at_the_end_of_what_was_fetched_of_the_delta_go_by_row() -> None:
    vectors = np.zeros((500, 2), np.float32)
    vectors[[7, 450]] = 1
    vectors[:400] -= 1
    view, state = catalogue_of(500), state_of(np.ones((2, 2), np.float32))
    index = grown(DenseIndex.build(DenseIndex.Config(delta=1), vectors[:400], catalogue_of(400), content_hash="m"), vectors)
    rows, scores = index.search(state, 5, view, jagged([[], [401, 450]]))
    assert rows.tolist() == [[450, 7, 400, 401, 402], [7, 400, 402, 403, 404]]
    assert scores.tolist() == [[2, 0, 0, 0, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize(("live_share", "scorable_share"), [(1.0, None), (0.3, None), (1.0, 0.5), (0.5, 0.5)])
def test_faiss_answers_where_little_is_excluded(live_share: float, scorable_share: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real vectors of several slots, few exclusions: the FAISS path alone serves all queries, and agrees with float64."""
    rng = np.random.default_rng(0)
    n, b, k = 3000, 40, 10
    vectors, queries = rng.normal(size=(n, 12)).astype(np.float32), rng.normal(size=(b, 12)).astype(np.float32)
    live = rng.random(n) < live_share
    scorable = None if scorable_share is None else rng.random(n) < scorable_share
    view = catalogue_of(n, ~live)
    index = build(vectors, view)
    scores64 = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    exclude = [np.argsort(-scores64[i])[: i % 7].tolist() for i in range(b)]
    monkeypatch.setattr(index, "_search_all", lambda *_: pytest.fail("computed all scores"))
    rows, scores = index.search(state_of(queries, 3), k, view, jagged(exclude), scorable)
    expected_rows, expected_scores = brute(scores64, k, live if scorable is None else live & scorable, exclude)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)


def test_ties_at_the_end_of_what_faiss_fetched_go_by_row() -> None:
    """FAISS alone returns the largest rows of a tie; the smallest are due."""
    vectors = np.zeros((400, 2), np.float32)
    vectors[[7, 300]] = 1
    view = catalogue_of(400)
    state = state_of(np.ones((2, 2), np.float32))
    rows, scores = build(vectors, view).search(state, 5, view, jagged([[], [1, 300]]))
    assert rows.tolist() == [[7, 300, 0, 1, 2], [7, 0, 2, 3, 4]]
    assert scores.tolist() == [[2, 2, 0, 0, 0], [2, 0, 0, 0, 0]]


floats = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, np.inf, -np.inf])


@given(st.lists(floats, min_size=1, max_size=30), st.integers(1, 35), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_keys_order_every_float_and_come_back_as_it(values: list[float], k: int, random: Any) -> None:
    """-0.0 ties with 0.0, and an item of score -inf is still an item, unlike one whose key is 0."""
    scores, rows = np.array([values], np.float32), np.array([random.sample(range(2**32 - 1), len(values))])
    keys = keys_of(scores, rows)
    assert (keys > 0).all()
    order = np.lexsort((rows[0], -scores[0]))[:k]
    best_rows, best_scores = best(np.concatenate([keys, np.zeros((1, 3), np.uint64)], axis=1), k)
    assert best_rows[0].tolist() == [*rows[0][order], *[-1] * (k - len(order))]
    assert best_scores[0].tolist() == [*scores[0][order], *[-np.inf] * (k - len(order))]


def test_a_user_with_a_long_history_does_not_change_the_others() -> None:
    rng = np.random.default_rng(1)
    vectors, queries = rng.normal(size=(1000, 4)).astype(np.float32), rng.normal(size=(3, 4)).astype(np.float32)
    view = catalogue_of(1000)
    index = build(vectors, view)
    exclude = [[1, 1, 1, 2], list(range(995)), []]
    rows, _ = index.search(state_of(queries), 8, view, jagged(exclude))
    for b in range(3):
        alone, _ = index.search(state_of(queries[b : b + 1]), 8, view, jagged([exclude[b]]))
        np.testing.assert_array_equal(rows[b], alone[0])
    assert set(rows[1]) == {995, 996, 997, 998, 999, -1}


def test_exclude_may_be_a_jagged_tensor_or_absent_and_scorable_a_tensor() -> None:
    rng = np.random.default_rng(2)
    vectors, state = rng.normal(size=(50, 4)).astype(np.float32), state_of(rng.normal(size=(2, 4)).astype(np.float32))
    view = catalogue_of(50)
    index = build(vectors, view)
    values, offsets = jagged([[3, 4], [5]])
    by_tuple = index.search(state, 50, view, (values, offsets))
    by_tensor = index.search(state, 50, view, JaggedTensor(torch.from_numpy(values), offsets=torch.from_numpy(offsets)))
    np.testing.assert_array_equal(by_tuple[0], by_tensor[0])
    everything = index.search(state, 50, view)[0]
    np.testing.assert_array_equal(everything, index.search(state, 50, view, jagged([[], [-1]]))[0])
    assert (np.sort(everything) == np.arange(50)).all()
    odd = torch.arange(50) % 2 == 1
    assert set(index.search(state, 50, view, scorable=odd)[0].ravel()) == {*range(1, 50, 2), -1}


def test_appended_items_leave_the_order_of_the_old_ones() -> None:
    rng = np.random.default_rng(3)
    vectors, state = rng.normal(size=(60, 4)).astype(np.float32), state_of(rng.normal(size=(5, 4)).astype(np.float32))
    before, _ = build(vectors[:40]).search(state, 40, catalogue_of(40))
    after, _ = build(vectors).search(state, 60, catalogue_of(60))
    for b in range(5):
        assert after[b][after[b] < 40].tolist() == before[b].tolist()


def test_indexes_that_follow_each_other_share_the_main_part_until_the_delta_is_a_share_of_it() -> None:
    vectors = np.random.default_rng(9).normal(size=(130, 4)).astype(np.float32)
    indexes = [build(vectors[:100])]
    for count in (104, 110, 111, 122, 123):
        indexes.append(grown(indexes[-1], vectors[:count]))
    parts = [(index._rows.main.ntotal, index._rows.delta.ntotal) for index in indexes]
    assert parts == [(100, 0), (100, 4), (100, 10), (111, 0), (111, 11), (123, 0)]
    for before, after in pairwise(indexes):
        shared = before._rows.main.ntotal == after._rows.main.ntotal
        assert (after._rows.main is before._rows.main) == (after._placed is before._placed) == shared
        assert np.shares_memory(after._rows.main_vectors, before._rows.main_vectors) == shared
        assert not np.shares_memory(after._rows.delta_vectors, before._rows.delta_vectors)
    for index in indexes:
        np.testing.assert_array_equal(index._rows.take(np.arange(index.meta.rows)), vectors[: index.meta.rows])
        whole = index.compacted()
        assert (whole._rows.main.ntotal, whole._rows.delta.ntotal, whole.meta) == (index.meta.rows, 0, index.meta)


def test_the_parts_outlive_the_index_that_they_came_from() -> None:
    vectors = np.random.default_rng(10).integers(-9, 10, (420, 4)).astype(np.float32)
    index, view, state = grown(build(vectors[:400]), vectors), catalogue_of(420), state_of(vectors[:3])
    rows, scores = index.search(state, 9, view)
    expected_rows, expected_scores = brute(vectors[:3] @ vectors.T, 9, view.live, [[]] * 3)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


def test_growing_costs_the_new_rows() -> None:
    """Ten times less than building anew, in time and in memory; it is hundreds of times."""
    vectors = np.random.default_rng(11).normal(size=(100_100, 64)).astype(np.float32)
    old_view, view = catalogue_of(100_000), catalogue_of(100_100)
    index = build(vectors[:100_000], old_view)

    def seconds(run: Callable[[], DenseIndex]) -> float:
        start = perf_counter()
        run()
        return perf_counter() - start

    anew = min(seconds(lambda: build(vectors, view)) for _ in range(3))
    assert min(seconds(lambda: grown(index, vectors, view)) for _ in range(5)) < anew / 10
    tracemalloc.start()
    try:
        longer = grown(index, vectors, view)
        assert tracemalloc.get_traced_memory()[1] < vectors.nbytes / 10
    finally:
        tracemalloc.stop()
    assert np.shares_memory(longer._rows.main_vectors, index._rows.main_vectors) and longer._rows.delta.ntotal == 100


def test_an_empty_catalogue_gives_empty_lists() -> None:
    view = catalogue_of(0)
    index = build(np.zeros((0, 4), np.float32), view)
    state = state_of(np.ones((2, 4), np.float32))
    rows, scores = index.search(state, 3, view, jagged([[], [-1]]))
    assert (rows == -1).all() and np.isneginf(scores).all() and rows.shape == (2, 3)
    assert np.isneginf(index.log_partition(state, view)).all()
    assert np.isneginf(index.score(state, np.full((2, 1), -1))).all()


def test_scores_of_given_items_are_sums_over_slots() -> None:
    rng = np.random.default_rng(4)
    items, users = torch.randn(30, 3, 4), torch.randn(6, 3, 4, requires_grad=True)
    index = build(items.flatten(1).numpy())
    rows = rng.integers(-1, 30, (6, 5))
    expected = torch.einsum("bkd,bckd->bc", users, items[torch.from_numpy(rows)]).detach().numpy()
    expected[rows < 0] = -np.inf
    scores = index.score(SlotVectors(users), rows)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_log_partition_is_the_softmax_normaliser_over_live_items() -> None:
    rng = np.random.default_rng(5)
    vectors, queries = rng.normal(size=(30, 4)).astype(np.float32), rng.normal(size=(6, 4)).astype(np.float32)
    live, scorable = rng.random(30) < 0.7, rng.random(30) < 0.7
    view = catalogue_of(30, ~live)
    index = build(vectors, view)
    rows, scores = index.search(state_of(queries), 30, view)
    probabilities = np.exp(scores - index.log_partition(state_of(queries), view)[:, None])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert ((probabilities > 0) == (rows >= 0)).all()
    expected = np.log(np.exp(queries @ vectors[live & scorable].T).sum(axis=1))
    np.testing.assert_allclose(index.log_partition(state_of(queries), view, scorable), expected, rtol=1e-4)


def test_large_batches_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    vectors, queries = rng.normal(size=(30, 4)).astype(np.float32), rng.normal(size=(7, 4)).astype(np.float32)
    view = catalogue_of(30)
    index = build(vectors, view)
    exclude = jagged([[0, b, 29 - b] for b in range(7)])

    def answers() -> list[np.ndarray]:
        rows, scores = index.search(state_of(queries), 10, view, exclude)
        return [rows, scores, index.score(state_of(queries), rows), index.log_partition(state_of(queries), view)]

    whole = answers()
    monkeypatch.setattr("recsys.retrieval.catalogue.index._SCORES_AT_ONCE", 64)
    for one, other in zip(whole, answers(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_search_errors() -> None:
    view = catalogue_of(6)
    index = build(np.eye(6, 4, dtype=np.float32), view)
    state = state_of(np.ones((2, 4), np.float32))
    with pytest.raises(ConfigError, match=r"accepts SlotVectors, got dict"):
        index.search({}, 1, view)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"state: \[2, 1, 3\] has 3 values for each user, the index has 4"):
        index.search(state_of(np.ones((2, 3), np.float32)), 1, view)
    with pytest.raises(BundleError, match="built for 6 catalogue rows, but the catalogue has 7"):
        index.search(state, 1, catalogue_of(7))
    with pytest.raises(BundleError, match="catalogue ids: the index has"):
        index.search(state, 1, Catalogue(["other", *(f"i{i}" for i in range(5))]).snapshot())
    with pytest.raises(DataError, match="k: expected at least 1, got 0"):
        index.search(state, 0, view)
    with pytest.raises(DataError, match="state: row 1 is not finite"):
        index.search(state_of(np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]], np.float32)), 1, view)
    with pytest.raises(DataError, match="exclude: 6 is not a catalogue row: expected -1 to 5"):
        index.search(state, 1, view, jagged([[0], [6]]))
    for offsets in ([0, 1], [0, 2, 1], [1, 1, 1], [0, 0, 0]):
        with pytest.raises(DataError, match="exclude: expected 3 ascending offsets from 0 to 1"):
            index.search(state, 1, view, (np.array([0]), np.array(offsets)))
    with pytest.raises(DataError, match=r"scorable: expected bool \[6\], got bool \[5\]"):
        index.search(state, 1, view, scorable=np.ones(5, bool))
    with pytest.raises(DataError, match=r"scorable: expected bool \[6\], got float64"):
        index.search(state, 1, view, scorable=np.ones(6))
    with pytest.raises(DataError, match=r"rows: expected shape \[2, C\], got \[3, 1\]"):
        index.score(state, np.zeros((3, 1), np.int64))
    with pytest.raises(DataError, match="rows: 6 is not a catalogue row"):
        index.score(state, np.full((2, 1), 6))


def test_new_rows_that_do_not_fit_are_named() -> None:
    index, view = build(np.eye(6, 4, dtype=np.float32)), catalogue_of(8)
    for shape in ((1, 4), (3, 4), (2, 5)):
        with pytest.raises(DataError, match=rf"vectors: expected \[2, 4\], one for each new row, got \[{shape[0]}, {shape[1]}\]"):
            index.extended(np.zeros(shape, np.float32), view)
    with pytest.raises(DataError, match="vectors: row 1 is not finite"):
        index.extended(np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]]), view)


def test_build_errors() -> None:
    with pytest.raises(DataError, match="each of the catalogue's 3 rows, got 2"):
        build(np.zeros((2, 4), np.float32), catalogue_of(3))
    with pytest.raises(DataError, match="vectors: row 1 is not finite"):
        build(np.array([[0.0], [np.inf]], np.float32))
    with pytest.raises(DataError, match="2 dimensions"):
        build(np.zeros((2, 4, 1), np.float32))


def test_save_and_load(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    view = catalogue_of(20)
    index = build(rng.normal(size=(20, 4)).astype(np.float32), view)
    index.save(tmp_path / "index")
    with pytest.raises(FileExistsError):
        index.save(tmp_path / "index")
    assert [p.name for p in tmp_path.iterdir()] == ["index"]

    retired = catalogue_of(20, np.arange(20) < 5)
    loaded = DenseIndex.load(tmp_path / "index", retired, content_hash="m")
    assert loaded.meta == index.meta
    state = state_of(rng.normal(size=(3, 4)).astype(np.float32))
    for ours, theirs in zip(loaded.search(state, 20, retired), index.search(state, 20, retired), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (loaded.search(state, 15, retired)[0] >= 5).all()


def test_load_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    view = catalogue_of(6)
    saved = tmp_path / "index"
    build(np.eye(6, 4, dtype=np.float32), view).save(saved)
    with pytest.raises(BundleError, match="content: the index has m, expected other"):
        DenseIndex.load(saved, view, content_hash="other")
    with pytest.raises(BundleError, match="built for 6 catalogue rows, but the catalogue has 5"):
        DenseIndex.load(saved, catalogue_of(5))
    with pytest.raises(BundleError, match="cannot read the index"):
        DenseIndex.load(tmp_path / "none", view)

    def broken(change: Any) -> Path:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(saved, copy)
        change(copy)
        return copy

    def other_state(copy: Path) -> None:
        stored = read_json(copy / "index.json")
        stored["meta"]["accepts"] = ["SlotLogProbs"]
        write_json(copy / "index.json", stored)

    def other_metric(copy: Path) -> None:
        faiss.write_index(faiss.IndexFlatL2(4), str(copy / "vectors.faiss"))

    def fewer_vectors(copy: Path) -> None:
        faiss.write_index(faiss.IndexFlatIP(4), str(copy / "vectors.faiss"))

    with pytest.raises(BundleError, match=r"user state: the index has .*SlotLogProbs.*, expected .*SlotVectors"):
        DenseIndex.load(broken(other_state), view)
    with pytest.raises(BundleError, match="expected an IndexFlatIP, got IndexFlatL2"):
        DenseIndex.load(broken(other_metric), view)
    with pytest.raises(BundleError, match=r"vectors: the index has \(0, 4\), expected \(6, 4\)"):
        DenseIndex.load(broken(fewer_vectors), view)
    for content in ("[]", "{", '{"config": {}, "meta": {"rows": "many"}}'):
        with pytest.raises(BundleError, match="cannot read the index"):
            DenseIndex.load(broken(lambda copy, text=content: (copy / "index.json").write_text(text)), view)
    with pytest.raises(BundleError, match="cannot read the index"):
        DenseIndex.load(broken(lambda copy: (copy / "vectors.faiss").write_bytes(b"IxFI")), view)


def test_the_number_of_torch_threads_is_left_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        view = catalogue_of(500)
        build(np.ones((500, 4), np.float32), view).search(state_of(np.ones((2, 4), np.float32)), 3, view)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class OtherState:
    pass


class GivesOther(Retriever):
    def encode(self, batch: SequenceBatch) -> OtherState:  # type: ignore[override]
        return OtherState()


def test_a_wrong_pair_is_named() -> None:
    check_pair(VectorRetriever, DenseIndex)
    check_pair(VectorRetriever, build(np.eye(2, dtype=np.float32)))
    with pytest.raises(ConfigError, match="retriever GivesOther gives OtherState, but index 'dense' accepts SlotVectors"):
        check_pair(GivesOther, DenseIndex)


def test_the_index_is_a_component() -> None:
    assert components.get("index", "dense") is DenseIndex
