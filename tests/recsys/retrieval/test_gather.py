# SPDX-License-Identifier: Apache-2.0
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from recsys.core.errors import ConfigError, DataError
from recsys.retrieval.catalogue import BeamIndex, Catalogue, CatalogueView, DenseIndex, GatherIndex, gather
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.state import SlotLogProbs, SlotVectors


@pytest.fixture(params=["native", "torch"], autouse=True, scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways of searching, whatever this machine would take."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(gather, "available", lambda: False)
        else:
            assert gather.available()
        yield request.param


def catalogue_of(live: np.ndarray) -> CatalogueView:
    catalogue = Catalogue([f"i{i}" for i in range(len(live))])
    catalogue.set_live([f"i{i}" for i in np.flatnonzero(~live)], False)
    return catalogue.snapshot()


def table_of(codes: np.ndarray, sizes: Any) -> CodeTable:
    return CodeTable(torch.from_numpy(codes).long(), tuple(sizes), "t")


def build(codes: np.ndarray, sizes: Any, view: CatalogueView, tile: int = 32) -> GatherIndex:
    return GatherIndex.build(GatherIndex.Config(tile=tile), table_of(codes, sizes), view)


def state_of(values: np.ndarray | torch.Tensor) -> SlotLogProbs:
    return SlotLogProbs(torch.as_tensor(values), "t")


def jagged(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([v for one in lists for v in one], np.int64), np.cumsum([0, *map(len, lists)])


def summed(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """float ``[B, N]``: every item's score, slot after slot."""
    return sum(
        (values[:, slot][:, codes[:, slot]] for slot in range(codes.shape[1])), start=np.zeros((len(values), len(codes)), values.dtype)
    )


def brute(scores: np.ndarray, k: int, allowed: np.ndarray, exclude: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """One list at a time, by a stable sort; -inf is no score."""
    rows, best = np.full((len(scores), k), -1), np.full((len(scores), k), -np.inf, np.float32)
    for b, excluded in enumerate(exclude):
        order = [i for i in np.argsort(-scores[b], kind="stable") if allowed[i] and i not in set(excluded) and scores[b, i] > -np.inf][:k]
        rows[b, : len(order)] = order
        best[b, : len(order)] = scores[b, order]
    return rows, best


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_search_against_brute_force_and_inner_products_with_one_hot_items(data: st.DataObject) -> None:
    """Halves: every score is exact whatever the order of summation, and most lists are full of ties."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, b = draw(st.integers(1, 150)), draw(st.integers(0, 12))
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    spread, closed = draw(st.sampled_from([0, 2, 100])), draw(st.sampled_from([0.0, 0.3]))
    codes = rng.integers(0, sizes, (n, len(sizes)))
    values = rng.integers(-spread, 1, (b, len(sizes), max(sizes))).astype(np.float32) / 2
    values[rng.random(values.shape) < closed] = -np.inf
    for slot, size in enumerate(sizes):
        values[:, slot, size:] = np.nan  # never read
    live = rng.random(n) < draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    scorable = rng.random(n) < draw(st.sampled_from([0.3, 1.0])) if draw(st.booleans()) else None
    most = draw(st.sampled_from([0, 3, n]))
    exclude = [rng.integers(-1, n, rng.integers(0, most + 1)).tolist() for _ in range(b)]
    k = draw(st.sampled_from([1, 2, 7, n, n + 3]))

    view = catalogue_of(live)
    rows, scores = build(codes, sizes, view, draw(st.sampled_from([32, 64, 8192]))).search(
        state_of(values), k, view, jagged(exclude), scorable
    )
    expected_rows, expected_scores = brute(summed(values, codes), k, live if scorable is None else live & scorable, exclude)
    assert rows.dtype == np.int64 and scores.dtype == np.float32
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)

    if closed == 0:
        items = functional.one_hot(torch.from_numpy(codes), max(sizes)).float().flatten(1)
        dense = DenseIndex.build(DenseIndex.Config(), items, view, content_hash="m")
        state = SlotVectors(torch.from_numpy(np.nan_to_num(values)))
        dense_rows, dense_scores = dense.search(state, k, view, jagged(exclude), scorable)
        np.testing.assert_array_equal(rows, dense_rows)
        np.testing.assert_array_equal(scores, dense_scores)


def random_case(seed: int, n: int, b: int) -> tuple[np.ndarray, list[int], torch.Tensor]:
    rng = np.random.default_rng(seed)
    sizes = [7, 5, 9]
    values = functional.log_softmax(torch.randn(b, 3, 9, generator=torch.Generator().manual_seed(seed)), -1)
    return rng.integers(0, sizes, (n, 3)), sizes, values


def test_more_users_than_one_chunk_and_more_items_than_one_tile() -> None:
    codes, sizes, values = random_case(0, 500, 150)
    rng = np.random.default_rng(0)
    live = rng.random(500) < 0.8
    view = catalogue_of(live)
    exclude = [rng.integers(-1, 500, 20).tolist() for _ in range(150)]
    rows, scores = build(codes, sizes, view).search(state_of(values), 11, view, jagged(exclude))
    expected_rows, expected_scores = brute(summed(values.numpy(), codes), 11, live, exclude)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
    np.testing.assert_array_equal(rows, expected_rows)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 100])
def test_a_user_alone_gets_the_very_same_answer(n: int) -> None:
    codes, sizes, values = random_case(1, n, 70)
    rng = np.random.default_rng(1)
    view = catalogue_of(rng.random(n) < 0.9)
    exclude = [rng.integers(-1, n, 3).tolist() for _ in range(70)]
    index = build(codes, sizes, view)
    rows, scores = index.search(state_of(values), 10, view, jagged(exclude))
    asked = np.maximum(rows, 0)
    given_scores = index.score(state_of(values), asked)
    for user in range(70):
        own = state_of(values[user : user + 1])
        own_rows, own_scores = index.search(own, 10, view, jagged(exclude[user : user + 1]))
        assert own_rows.tolist() == rows[user : user + 1].tolist()
        assert own_scores.tobytes() == scores[user : user + 1].tobytes()
        assert index.score(own, asked[user : user + 1]).tobytes() == given_scores[user : user + 1].tobytes()


def test_scores_of_given_items_are_those_of_the_search() -> None:
    codes, sizes, values = random_case(2, 40, 6)
    view = catalogue_of(np.arange(40) > 3)
    index = build(codes, sizes, view)
    rows = np.random.default_rng(2).integers(-1, 40, (6, 9))
    expected = np.take_along_axis(summed(values.numpy(), codes), np.maximum(rows, 0), 1)
    expected[rows < 0] = -np.inf
    scores = index.score(state_of(values.requires_grad_()), rows)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    found, best = index.search(state_of(values), 40, view)
    np.testing.assert_array_equal(index.score(state_of(values), found), best)
    assert index.score(state_of(values), np.zeros((6, 0), np.int64)).shape == (6, 0)


def test_log_partition_is_the_softmax_normaliser_over_live_items(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, sizes, values = random_case(3, 60, 5)
    values[0, 1] = -torch.inf
    rng = np.random.default_rng(3)
    live, scorable = rng.random(60) < 0.7, rng.random(60) < 0.7
    view = catalogue_of(live)
    index = build(codes, sizes, view)
    with np.errstate(divide="ignore"):
        expected = np.log(np.exp(summed(values.numpy().astype(np.float64), codes))[:, live & scorable].sum(axis=1))
    found = index.log_partition(state_of(values), view, scorable)
    assert found.dtype == np.float32 and found[0] == -np.inf
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.isneginf(index.log_partition(state_of(values), view, np.zeros(60, bool))).all()
    monkeypatch.setattr("recsys.retrieval.catalogue.index._SCORES_AT_ONCE", 35)
    np.testing.assert_allclose(index.log_partition(state_of(values), view, scorable), expected, rtol=1e-5)
    _, scores = index.search(state_of(values[1:]), 60, view)
    probabilities = np.exp(scores - index.log_partition(state_of(values[1:]), view)[:, None])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


def test_the_least_of_scores_is_still_one() -> None:
    view, least = catalogue_of(np.ones(40, bool)), float(np.finfo(np.float32).min)
    values = np.array([[[least, -np.inf]]], np.float32)
    rows, scores = build(np.arange(40)[:, None] % 2, (2,), view).search(state_of(values), 30, view)
    assert rows.tolist() == [[*range(0, 40, 2), *[-1] * 10]] and scores[0, 19] == least


def test_two_items_with_the_same_codes_both_come_back() -> None:
    view = catalogue_of(np.ones(3, bool))
    rows, scores = build(np.array([[0, 1], [1, 0], [0, 1]]), (2, 2), view).search(state_of(-np.ones((1, 2, 2), np.float32)), 3, view)
    assert rows.tolist() == [[0, 1, 2]] and scores.tolist() == [[-2, -2, -2]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_state_that_is_not_of_log_probabilities_is_named(bad: float) -> None:
    codes, sizes, values = random_case(4, 20, 3)
    view = catalogue_of(np.ones(20, bool))
    index = build(codes, sizes, view)
    values[2, 1, 3] = bad
    for ask in (
        lambda: index.search(state_of(values), 3, view),
        lambda: index.score(state_of(values), np.zeros((3, 1), np.int64)),
        lambda: index.log_partition(state_of(values), view),
    ):
        with pytest.raises(DataError, match="state: row 2: slot 1 holds NaN or infinity"):
            ask()
    for wrong in (values[:, :2], values[:, :, :8], values[0]):
        with pytest.raises(ConfigError, match=r"state: expected \[B, 3, 9\] log-probabilities"):
            index.search(state_of(wrong), 3, view)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_kinds_of_floats_and_a_wider_state_are_understood(dtype: torch.dtype) -> None:
    codes, sizes, values = random_case(5, 50, 4)
    view = catalogue_of(np.ones(50, bool))
    index = build(codes, sizes, view)
    values = values.to(dtype)
    wider = torch.cat((values, torch.full((4, 3, 2), torch.nan, dtype=dtype)), 2)
    for one, other in zip(index.search(state_of(values.float()), 9, view), index.search(state_of(wider), 9, view), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["gather", "beam"])
def test_no_reader_ever_sees_a_dead_item_or_one_of_another_catalogue(kind: str) -> None:
    """100,000 decoded items, while a writer appends items and retires and brings back others; index and view are swapped as one."""
    rng = np.random.default_rng(6)
    sizes, most = (8, 8, 8), 2000
    codes = rng.integers(0, sizes, (most, 3))
    catalogue = Catalogue([f"i{i}" for i in range(200)])
    index: GatherIndex | BeamIndex
    if kind == "gather":
        index = GatherIndex.build(GatherIndex.Config(tile=256), table_of(codes[:200], sizes), catalogue.snapshot())
    else:
        index = BeamIndex.build(BeamIndex.Config(width=20), table_of(codes[:200], sizes), catalogue.snapshot())
    served = [(index, catalogue.snapshot())]
    stop = threading.Event()
    writes = [0]

    def write() -> None:
        own = np.random.default_rng(7)
        while not stop.is_set():
            index, view = served[0]
            if view.count < most:
                catalogue.add([f"i{view.count + i}" for i in range(10)])
                view = catalogue.snapshot()
                index = index.extended(table_of(codes[: view.count], sizes), view)
            catalogue.set_live([f"i{row}" for row in own.integers(0, view.count, 40)], bool(own.integers(2)))
            served[0] = (index, catalogue.snapshot())
            writes[0] += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        decoded, counts = 0, set()
        while decoded < 100_000 or writes[0] < 20:
            index, view = served[0]
            values = rng.normal(size=(50, 3, 8)).astype(np.float32)
            rows, scores = index.search(state_of(values), 20, view)
            found = rows[rows >= 0]
            assert (found < view.count).all() and view.live[found].all()
            assert (np.count_nonzero(rows >= 0, axis=1) == min(20, view.live_count)).all()
            np.testing.assert_allclose(scores, np.take_along_axis(summed(values, codes), rows, 1), rtol=1e-5)
            decoded += len(found)
            counts.add(view.count)
    finally:
        stop.set()
        writer.join()
    assert len(counts) > 3


@pytest.mark.parametrize("tile", [32, 64, 1024])
def test_the_scores_of_all_items_are_those_of_each(tile: int) -> None:
    rng = np.random.default_rng(9)
    codes, values = rng.integers(0, (7, 5), (150, 2)), rng.normal(size=(6, 2, 7)).astype(np.float32)
    index = build(codes, (7, 5), catalogue_of(rng.random(150) < 0.5), tile)
    everything = index.score_all(state_of(values))
    assert everything.dtype == np.float32 and everything.shape == (6, 150)
    np.testing.assert_allclose(everything, summed(values, codes), rtol=1e-6)
    np.testing.assert_allclose(everything, index.score(state_of(values), np.tile(np.arange(150), (6, 1))), rtol=1e-6)
