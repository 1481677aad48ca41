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

from kernels import native
from kernels.gather_topk import Bags, cpu, gather_topk
from kernels.gather_topk.reference import gather_topk as plain


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
    expected_rows, expected = plain(values, table, k)
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
    expected_rows, expected = plain(values, table, 50)
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


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which nothing was compiled yet."""
    native.load.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path
    native.load.cache_clear()


def test_what_is_compiled_is_kept_by_content(fresh: Path) -> None:
    assert native.load(cpu._SOURCE) is not None
    (made,) = native.cache_folder().iterdir()
    stamp = made.stat().st_mtime_ns
    native.load.cache_clear()
    assert native.load(cpu._SOURCE) is not None
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
    assert not cpu.available()
    weights, bags = weights_and_bags(*drawn(2, 10, 2, 3))
    with pytest.raises(RuntimeError, match="expected a C\\+\\+ compiler on this machine"):
        gather_topk(weights, bags, 1)


def test_a_cache_that_cannot_be_written_is_no_error(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = fresh / "file"
    file.write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(file))
    assert native.load(cpu._SOURCE) is None


def test_a_process_without_a_home_is_no_error(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert native.load(cpu._SOURCE) is None
