# SPDX-License-Identifier: Apache-2.0
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.retrieval.catalogue.trie import CodeTrie


class Plain:
    """A node of a trie of dicts: how the published code keeps it, and plain to see."""

    def __init__(self) -> None:
        self.children: dict[int, Plain] = {}
        self.rows: list[int] = []

    def insert(self, row: int, codes: list[int]) -> None:
        self.rows.append(row)
        if codes:
            self.children.setdefault(codes[0], Plain()).insert(row, codes[1:])

    def sorted_children(self) -> list[tuple[int, "Plain"]]:
        return sorted(self.children.items())


def plain(codes: np.ndarray) -> list[Plain]:
    """The nodes of depth 0: the root, where there are items."""
    root = Plain()
    for row, own in enumerate(codes.tolist()):
        root.insert(row, own)
    return [root] if len(codes) else []


def hold_equal_to_plain(trie: CodeTrie, codes: np.ndarray, allowed: np.ndarray) -> None:
    nodes, counts = plain(codes), trie.counts(allowed)
    for depth in range(codes.shape[1] + 1):
        assert len(trie.starts[depth]) == len(nodes) + 1
        assert counts[depth].tolist() == [int(allowed[node.rows].sum()) for node in nodes]
        rows = np.array([row for node in nodes for row in node.rows], np.int64)
        assert trie.nodes_of(rows, depth).tolist() == [number for number, node in enumerate(nodes) for _ in node.rows]
        if depth < codes.shape[1]:
            children = [node.sorted_children() for node in nodes]
            assert trie.first_child[depth].tolist() == np.cumsum([0, *map(len, children)]).tolist()
            assert trie.code_of[depth].tolist() == [code for own in children for code, _ in own]
            nodes = [node for own in children for _, node in own]
    leaves = [trie.order[start:stop].tolist() for start, stop in zip(trie.starts[-1][:-1], trie.starts[-1][1:], strict=True)]
    assert leaves == [node.rows for node in nodes]
    assert trie.order[trie.place].tolist() == list(range(len(codes)))


def hold_equal(trie: CodeTrie, other: CodeTrie) -> None:
    assert trie.order.tolist() == other.order.tolist()
    for one, two in zip(trie.starts, other.starts, strict=True):
        assert one.tolist() == two.tolist()
    for one, two in zip((*trie.first_child, *trie.code_of), (*other.first_child, *other.code_of), strict=True):
        assert one.tolist() == two.tolist()


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    """Codes with many duplicates, and level sizes."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(0, sizes, (draw(st.integers(0, 40)), len(sizes))), sizes


@given(catalogues(), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=150, deadline=None)
def test_the_arrays_are_a_trie_of_dicts(catalogue: tuple[np.ndarray, list[int]], seed: int, share: float) -> None:
    codes, sizes = catalogue
    hold_equal_to_plain(CodeTrie.build(codes, sizes), codes, np.random.default_rng(seed).random(len(codes)) < share)


@given(catalogues(), st.lists(st.floats(0, 1), max_size=3), st.booleans())
@settings(max_examples=100, deadline=None)
def test_appending_is_as_good_as_building(catalogue: tuple[np.ndarray, list[int]], shares: list[float], wide: bool) -> None:
    codes, sizes = catalogue
    sizes = [2**40] * len(sizes) if wide else sizes  # keys of such codes do not fit into a number from two levels on
    cuts = sorted(int(share * len(codes)) for share in shares)
    trie = CodeTrie.build(codes[: cuts[0] if cuts else 0], sizes)
    for part in np.split(codes, cuts)[1:] if cuts else [codes]:
        before = trie.order.copy()
        longer = trie.extended(part)
        assert trie.order.tolist() == before.tolist()
        trie = longer
    hold_equal(trie, CodeTrie.build(codes, sizes))
    assert trie.codes.tolist() == codes.tolist()


@given(catalogues())
@settings(max_examples=100, deadline=None)
def test_codes_of_levels_too_large_for_one_key_make_the_same_trie(catalogue: tuple[np.ndarray, list[int]]) -> None:
    codes, sizes = catalogue
    hold_equal(CodeTrie.build(codes, [2**62] * len(sizes)), CodeTrie.build(codes, sizes))


@pytest.mark.parametrize("sizes", [(2**31, 2**31, 2), (2**31, 2**31, 1), (2**62,), (2**63, 1)])
def test_the_largest_codes_stay_in_order(sizes: tuple[int, ...]) -> None:
    """On either side of where the keys no longer fit."""
    last = [size - 1 for size in sizes]
    codes = np.array([last, [0] * len(sizes), last, [last[0], *[0] * (len(sizes) - 1)]])
    rows = [tuple(row) for row in codes.tolist()]
    assert CodeTrie.build(codes, sizes).order.tolist() == sorted(range(4), key=lambda row: rows[row])


@pytest.mark.parametrize("sizes", [(3, 2), (2**40, 2**40)])
def test_no_items_and_one(sizes: Any) -> None:
    empty = CodeTrie.build(np.zeros((0, 2), np.int64), sizes)
    assert [starts.tolist() for starts in empty.starts] == [[0]] * 3
    hold_equal_to_plain(empty, empty.codes, np.zeros(0, bool))
    one = np.array([[2, 1]])
    for trie in (CodeTrie.build(one, sizes), empty.extended(one)):
        hold_equal_to_plain(trie, one, np.ones(1, bool))
        assert [codes.tolist() for codes in trie.code_of] == [[2], [1]]
