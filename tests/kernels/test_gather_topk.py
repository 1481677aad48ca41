# SPDX-License-Identifier: Apache-2.0
"""The native search over codes against plain numpy, and what happens where there is none."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import backend, native
from kernels.gather_topk import Bags, best_items, cpu, gather_topk
from kernels.gather_topk import native as loop
from kernels.gather_topk.reference import gather_topk as plain

WAYS: dict[str, backend.Backend] = {"native": "native", "bag": "cpu", "reference": "reference", "float64": "native"}


def drawn(users: int, items: int, slots: int, codes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Halves, so that lists are full of ties."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(-20, 20, (users, slots, codes), generator=random) / 2
    return values, torch.randint(0, codes, (items, slots), generator=random)


def weights_and_bags(values: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, Bags]:
    width = values.shape[1] * values.shape[2]
    bags = (codes + torch.arange(codes.shape[1]) * values.shape[2]).to(torch.int32)
    return values.flatten(1).T.contiguous(), Bags(bags, width)


def told(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores of keys, by another way than the library's."""
    ordered = (keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(ordered >> 31, ordered ^ np.uint32(0x80000000), ~ordered)
    scores = np.where(keys > 0, bits.astype(np.uint32).view(np.float32), -np.inf)
    rows = np.where(keys > 0, (np.uint64(0xFFFFFFFF) - (keys & np.uint64(0xFFFFFFFF))).astype(np.int64), -1)
    return rows, scores


@given(
    users=st.integers(1, 40),
    items=st.integers(0, 300),
    slots=st.integers(1, 5),
    codes=st.integers(1, 9),
    k=st.integers(1, 400),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_equals_plain_numpy_with_ties(users: int, items: int, slots: int, codes: int, k: int, seed: int) -> None:
    values, table = drawn(users, items, slots, codes, seed)
    rows, scores = told(gather_topk(*weights_and_bags(values, table), k))
    expected_rows, expected = plain(values, table, k=k)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    values, table = drawn(21, 40_000, 4, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        rows, scores = told(gather_topk(*weights_and_bags(values, table), 50))
    finally:
        torch.set_num_threads(before)
    expected_rows, expected = plain(values, table, k=50)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected)


def test_only_given_rows_come_back_and_none_that_is_excluded() -> None:
    values, table = drawn(5, 5_000, 3, 7)
    chosen = np.flatnonzero(np.random.default_rng(0).random(5_000) < 0.3)
    excluded = [np.sort(np.random.default_rng(user).choice(chosen, 400 * user, replace=False)) for user in range(4)] + [chosen]
    offsets = np.cumsum([0, *map(len, excluded)])
    rows, _ = told(gather_topk(*weights_and_bags(values, table), 60, chosen, offsets, np.concatenate(excluded)))
    scores = sum(values[:, slot, table[:, slot]] for slot in range(3)).numpy()
    for user in range(5):
        left = np.setdiff1d(chosen, excluded[user])
        wanted = left[np.lexsort((left, -scores[user, left]))][:60]
        np.testing.assert_array_equal(rows[user, : len(wanted)], wanted)
        assert (rows[user, len(wanted) :] == -1).all()
    assert (rows[4] == -1).all()


def test_minus_infinity_and_nan_are_no_scores_and_minus_zero_is_zero() -> None:
    values = torch.tensor([[[-torch.inf, torch.nan, -0.0, 0.0, torch.inf, -1.0]]])
    rows, scores = told(gather_topk(*weights_and_bags(values, torch.arange(6)[:, None]), 6))
    assert rows[0].tolist() == [4, 2, 3, 5, -1, -1]
    assert scores[0, :4].tolist() == [np.inf, 0.0, 0.0, -1.0]


def test_wrong_arguments_are_named() -> None:
    weights, bags = weights_and_bags(*drawn(2, 10, 2, 3))
    with pytest.raises(ValueError, match=r"bags: expected rows of 5 weights, got 0 to 5"):
        Bags(torch.tensor([[0, 5]], dtype=torch.int32), 5)
    with pytest.raises(ValueError, match=r"bags: expected contiguous torch\.int32"):
        Bags(bags.rows.long(), 6)
    with pytest.raises(ValueError, match="weights: expected 6 rows, as the bags name, got 5"):
        gather_topk(weights[:5].contiguous(), bags, 1)
    with pytest.raises(ValueError, match=r"weights: expected contiguous torch\.float32"):
        gather_topk(weights.T, bags, 1)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        gather_topk(weights, bags, 0)
    with pytest.raises(ValueError, match="rows: expected some of 10 items, ascending, got 3 to 10"):
        gather_topk(weights, bags, 1, np.array([3, 10]))
    with pytest.raises(ValueError, match="excluded: expected offsets for 2 users up to 1 rows"):
        gather_topk(weights, bags, 1, None, np.array([0, 1]), np.array([3]))


def brute(values: torch.Tensor, codes: torch.Tensor, rows: set[int], dropped: list[set[int]], k: int) -> tuple[list, list]:
    """One item at a time; sums of halves are exact."""
    found, scores = [], []
    for user, own in enumerate(values.tolist()):
        sums = [(sum(own[slot][code] for slot, code in enumerate(item)), row) for row, item in enumerate(codes.tolist())]
        best = sorted((-score, row) for score, row in sums if row in rows - dropped[user] and score > -np.inf)[:k]
        found.append([row for _, row in best] + [-1] * (k - len(best)))
        scores.append([-score for score, _ in best] + [-np.inf] * (k - len(best)))
    return found, scores


@pytest.mark.parametrize("form", ["native", "bag", "reference", "float64"])
@given(
    users=st.integers(0, 5),
    items=st.integers(0, 60),
    slots=st.integers(1, 4),
    codes=st.integers(1, 6),
    k=st.sampled_from([1, 7, 100]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_the_op_equals_brute_force_with_masks(form: str, users: int, items: int, slots: int, codes: int, k: int, seed: int) -> None:
    values, table = drawn(users, items, slots, codes, seed)
    random = torch.Generator().manual_seed(seed)
    values[torch.rand(values.shape, generator=random) < 0.1] = -torch.inf
    rows = (torch.rand(items, generator=random) < 0.7).nonzero()[:, 0]
    user, excluded = (torch.rand(users, items, generator=random) < 0.3).nonzero(as_tuple=True)
    offsets = torch.searchsorted(user, torch.arange(users + 1))
    dropped = [set(excluded[user == one].tolist()) for one in range(users)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_TILE", 13)
        with backend.use(WAYS[form]):
            given_values = values.double() if form == "float64" else values
            found, scores = best_items(given_values, table, rows, offsets, excluded, k)
            everything, all_scores = best_items(given_values, table.int(), None, None, None, k)
    assert scores.dtype == given_values.dtype
    assert (found.tolist(), scores.tolist()) == brute(values, table, set(rows.tolist()), dropped, k)
    assert (everything.tolist(), all_scores.tolist()) == brute(values, table, set(range(items)), [set()] * users, k)


@pytest.mark.parametrize("form", ["native", "bag", "reference"])
def test_the_op_takes_nan_for_no_score_and_minus_zero_for_zero(form: str) -> None:
    values = torch.tensor([[[-torch.inf, torch.nan, -0.0, 0.0, torch.inf, -1.0]]])
    with backend.use(WAYS[form]):
        rows, scores = best_items(values, torch.arange(6)[:, None], None, None, None, 6)
    assert rows.tolist() == [[4, 2, 3, 5, -1, -1]]
    assert scores.tolist() == [[np.inf, 0.0, 0.0, -1.0, -np.inf, -np.inf]]


def test_wrong_arguments_of_the_op_are_named() -> None:
    values, codes = drawn(2, 10, 2, 3)
    numbers = torch.arange(3)
    with pytest.raises(ValueError, match=r"values: expected floating-point \[B, K, V\], got torch.float32 of shape \(2, 2\)"):
        best_items(values[..., 0], codes, None, None, None, 1)
    with pytest.raises(ValueError, match=r"codes: expected int32 or int64 \[N, 2\], as there are slots, got torch.int64"):
        best_items(values, codes[:, :1], None, None, None, 1)
    with pytest.raises(ValueError, match=r"rows: expected torch.int64 of one axis, got torch.int32 of shape \(3,\)"):
        best_items(values, codes, numbers.int(), None, None, 1)
    with pytest.raises(ValueError, match="excluded, excluded_offsets: expected both or neither"):
        best_items(values, codes, None, None, numbers, 1)
    with pytest.raises(ValueError, match=r"excluded_offsets: expected torch.int64 \(3,\), got torch.int64 of shape \(2,\)"):
        best_items(values, codes, None, numbers[:2], numbers, 1)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        best_items(values, codes, None, None, None, 0)
    with pytest.raises(RuntimeError, match="codes: expected 0 to 2, got 0 to 3"):
        best_items(values, torch.tensor([[0, 3]]), None, None, None, 1)
    with pytest.raises(RuntimeError, match="rows: expected 0 to 9, got 3 to 10"):
        best_items(values, codes, torch.tensor([3, 10]), None, None, 1)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which nothing was compiled yet."""
    native.load.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path
    native.load.cache_clear()


def test_what_is_compiled_is_kept_by_content(fresh: Path) -> None:
    assert native.load(loop._SOURCE) is not None
    (made,) = native.cache_folder().iterdir()
    stamp = made.stat().st_mtime_ns
    native.load.cache_clear()
    assert native.load(loop._SOURCE) is not None
    assert [file.stat().st_mtime_ns for file in native.cache_folder().iterdir()] == [stamp]


def test_a_source_that_does_not_compile_is_logged_and_leaves_nothing(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = fresh / "broken.cpp"
    source.write_text("int main( {", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert native.load(source) is None
        assert native.load(source) is None
    assert len(caplog.records) == 1
    assert "broken.cpp: not compiled, a slower way is taken:" in caplog.text and "error" in caplog.text
    assert list(native.cache_folder().iterdir()) == []


@pytest.mark.parametrize(("name", "value"), [("RECSYS_NATIVE", "0"), ("CXX", "/nowhere/g++")])
def test_without_a_compiler_there_is_another_way(fresh: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert not loop.available()
    weights, bags = weights_and_bags(*drawn(2, 10, 2, 3))
    with pytest.raises(RuntimeError, match="expected a C\\+\\+ compiler on this machine"):
        gather_topk(weights, bags, 1)


def test_a_cache_that_cannot_be_written_is_no_error(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = fresh / "file"
    file.write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(file))
    assert native.load(loop._SOURCE) is None


def test_a_process_without_a_home_is_no_error(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert native.load(loop._SOURCE) is None
