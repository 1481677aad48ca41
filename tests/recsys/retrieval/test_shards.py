# SPDX-License-Identifier: Apache-2.0
"""Lists of a catalogue in parts are those of the whole, to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core.errors import DataError
from recsys.retrieval.catalogue import BeamIndex, Catalogue, CatalogueView, DenseIndex, GatherIndex, Index
from recsys.retrieval.catalogue.shards import merge, merge_log_partitions, ranges
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.state import SlotLogProbs, SlotVectors

USERS, LEVELS, CODES = 4, 3, 4
State = SlotVectors | SlotLogProbs


@given(rows=st.integers(0, 1000), parts=st.integers(1, 70))
def test_ranges_hold_every_row_once_and_differ_by_one_at_most(rows: int, parts: int) -> None:
    found = ranges(rows, parts)
    assert [row for part in found for row in part] == list(range(rows))
    assert len(found) == parts and max(map(len, found)) - min(map(len, found)) <= 1


@settings(deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), k=st.integers(1, 12))
def test_merged_lists_are_those_of_sorting_everything(data: st.DataObject, sizes: list[int], k: int) -> None:
    # Few different scores, so that most are tied; 0.0 and -0.0 are one.
    score = st.sampled_from([-np.inf, -3.5, -0.0, 0.0, 1e-30, 2.0, 3e38])
    scores = np.array([data.draw(st.lists(score, min_size=sum(sizes), max_size=sum(sizes))) for _ in range(2)], np.float32)
    scores = scores.reshape(2, sum(sizes))
    firsts = np.cumsum([0, *sizes[:-1]])
    lists = [sorted_list(scores[:, first : first + size], k) for first, size in zip(firsts, sizes, strict=True)]
    rows, merged = merge(lists, firsts.tolist(), k)
    expected_rows, expected = sorted_list(scores, k)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(merged, expected)


def sorted_list(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The oracle: numpy's stable sort of everything, padded."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    missing = ((0, 0), (0, k - order.shape[1]))
    return np.pad(order, missing, constant_values=-1), np.pad(np.take_along_axis(scores, order, 1), missing, constant_values=-np.inf)


def dense(rows: np.ndarray, view: CatalogueView) -> DenseIndex:
    """Vectors of whole numbers, whose products are exact in every order of summing; of 200 items many are tied."""
    vectors = np.random.default_rng(0).integers(-2, 3, (200, 3)).astype(np.float32)
    return DenseIndex.build(DenseIndex.Config(), vectors[rows], view, content_hash="drawn")


def table(rows: np.ndarray) -> CodeTable:
    codes = torch.randint(0, CODES, (200, LEVELS), generator=torch.Generator().manual_seed(1))
    return CodeTable(codes[torch.from_numpy(rows)], (CODES,) * LEVELS, "drawn")


def gather(rows: np.ndarray, view: CatalogueView) -> GatherIndex:
    return GatherIndex.build(GatherIndex.Config(), table(rows), view)


def beam(rows: np.ndarray, view: CatalogueView) -> BeamIndex:
    """So wide that nothing is cut."""
    return BeamIndex.build(BeamIndex.Config(width=CODES**LEVELS), table(rows), view)


def state_for(kind: object) -> State:
    if kind is dense:
        return SlotVectors(torch.randint(-2, 3, (USERS, 1, 3), generator=torch.Generator().manual_seed(2)).float())
    values = torch.randn(USERS, LEVELS, CODES, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    return SlotLogProbs(values, "drawn")


@pytest.mark.parametrize("kind", [dense, gather, beam])
@pytest.mark.parametrize(("parts", "k"), [(1, 10), (2, 10), (7, 10), (64, 25), (200, 40), (3, 200)])
def test_indexes_of_parts_find_what_an_index_of_the_whole_finds(kind: object, parts: int, k: int) -> None:
    build, state = kind, state_for(kind)
    random = np.random.default_rng(4)
    live, seen = random.random(200) < 0.7, [np.sort(random.choice(200, 30, replace=False)) for _ in range(USERS)]
    whole, view = index_of(build, np.arange(200), live)
    expected = whole.search(state, k, view, exclude=jagged(seen))

    lists, sums, shares = [], [], ranges(200, parts)
    for share in shares:
        own, own_view = index_of(build, np.array(share), live)
        excluded = jagged([rows[(rows >= share.start) & (rows < share.stop)] - share.start for rows in seen])
        lists.append(own.search(state, k, own_view, exclude=excluded))
        sums.append(own.log_partition(state, own_view))
    rows, scores = merge(lists, [share.start for share in shares], k)
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_array_equal(scores, expected[1])
    np.testing.assert_allclose(merge_log_partitions(sums), whole.log_partition(state, view), rtol=1e-5)


def index_of(build: object, rows: np.ndarray, live: np.ndarray) -> tuple[Index, CatalogueView]:
    catalogue = Catalogue([f"item {row}" for row in rows])
    catalogue.set_live([f"item {row}" for row in rows[~live[rows]]], False)
    view = catalogue.snapshot()
    return build(rows, view), view  # type: ignore[operator]


def jagged(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


def test_parts_without_any_item_have_no_share_in_the_sum() -> None:
    nothing = np.full(2, -np.inf, np.float32)
    np.testing.assert_array_equal(merge_log_partitions([nothing, nothing]), nothing)
    np.testing.assert_array_equal(merge_log_partitions([nothing, np.ones(2, np.float32)]), np.ones(2, np.float32))


@pytest.mark.parametrize(
    ("lists", "firsts", "k", "message"),
    [
        ([], [], 1, "lists: expected at least one"),
        ([(np.zeros((2, 1), np.int64), np.zeros((2, 1), np.float32))], [0, 1], 1, "a first row for each, got 1 and 2"),
        ([(np.zeros((2, 1), np.int64), np.zeros((2, 2), np.float32))], [0], 1, "rows and scores of one shape"),
        ([(np.zeros((2, 1), np.int64), np.zeros((2, 1), np.float32))], [0], 0, "k: expected at least 1"),
    ],
)
def test_what_does_not_fit_is_named(lists: list, firsts: list[int], k: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        merge(lists, firsts, k)


def test_a_catalogue_has_at_least_one_part() -> None:
    with pytest.raises(DataError, match="parts: expected at least 1, got 0"):
        ranges(10, 0)
