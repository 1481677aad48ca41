# SPDX-License-Identifier: Apache-2.0
"""The codes of a catalogue as a trie in a few arrays (compressed sparse rows), read by vectorised gathers.

Items are sorted by their codes, so that a node of any depth is a range of sorted items, its children are a range of the nodes one deeper,
and how many live items lie below it is the difference of two prefix sums: retiring items or bringing them back changes no array
of the trie. STATIC (arXiv 2602.22647) has the same idea of rows of children; it numbers states instead, and keeps no items at its leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CodeTrie:
    """Depth 0 is the root, depth L the leaves; nodes of a depth are numbered in the lexicographic order of their codes.

    Attributes:
        codes: int ``[N, L]`` of all rows, as they were given.
        level_sizes: how many codes each level has.
        order: int64 ``[N]``: the rows in the order of their codes, then of rows.
    """

    codes: np.ndarray
    level_sizes: tuple[int, ...]
    order: np.ndarray

    @classmethod
    def build(cls, codes_nl: np.ndarray, level_sizes: Sequence[int]) -> Self:
        """Sort the rows of codes ``[N, L]``."""
        return cls(codes_nl, tuple(level_sizes), np.argsort(_keys(codes_nl, level_sizes), kind="stable"))

    def extended(self, codes_ml: np.ndarray) -> Self:
        """A trie of M more rows, numbered after the present ones: they are merged into the order, nothing is sorted anew."""
        first = len(self.codes)
        codes = np.concatenate((self.codes, codes_ml.astype(self.codes.dtype)))
        keys = _keys(codes, self.level_sizes)
        new = first + np.argsort(keys[first:], kind="stable")
        places = np.searchsorted(keys[self.order], keys[new], side="right")
        return type(self)(codes, self.level_sizes, np.insert(self.order, places, new))

    @cached_property
    def starts(self) -> tuple[np.ndarray, ...]:
        """For each depth 0 … L int64 ``[nodes + 1]``: where each node's sorted items begin; the last entry is N."""
        count, levels = self.codes.shape
        changed = np.zeros(count, bool)
        starts = [np.array([0, count])] if count else [np.zeros(1, np.int64)]
        if count:
            changed[0] = True
        for level in range(levels):
            column = self.codes[self.order, level]
            changed[1:] |= column[1:] != column[:-1]
            starts.append(np.append(np.flatnonzero(changed), count))
        return tuple(starts)

    @cached_property
    def first_child(self) -> tuple[Tensor, ...]:
        """For each depth 0 … L - 1 int64 ``[nodes + 1]``: one deeper, node j has the children ``first[j]`` to ``first[j + 1]``."""
        return tuple(torch.from_numpy(np.searchsorted(deeper, upper)) for upper, deeper in pairwise(self.starts))

    @cached_property
    def code_of(self) -> tuple[Tensor, ...]:
        """For each depth 1 … L int64 ``[nodes]``: the code that leads to each node."""
        found = [self.codes[self.order[starts[:-1]], level] for level, starts in enumerate(self.starts[1:])]
        return tuple(torch.from_numpy(codes.astype(np.int64)) for codes in found)

    @cached_property
    def place(self) -> np.ndarray:
        """int64 ``[N]``: where each row stands in ``order``."""
        places = np.empty(len(self.order), np.int64)
        places[self.order] = np.arange(len(self.order))
        return places

    def counts(self, allowed: np.ndarray) -> tuple[np.ndarray, ...]:
        """For each depth 0 … L int64 ``[nodes]``: how many rows of a mask ``[N]`` lie below each node."""
        below = np.concatenate(([0], np.cumsum(allowed[self.order])))
        return tuple(np.diff(below[starts]) for starts in self.starts)

    def nodes_of(self, rows: np.ndarray, depth: int) -> np.ndarray:
        """int64: the node of a depth below which each row lies."""
        found: np.ndarray = np.searchsorted(self.starts[depth], self.place[rows], side="right") - 1
        return found


def _keys(codes_nl: np.ndarray, level_sizes: Sequence[int]) -> np.ndarray:
    """int64 ``[N]`` in the lexicographic order of the rows, equal for equal rows."""
    if prod(level_sizes) < 1 << 63:
        keys = np.zeros(len(codes_nl), np.int64)
        for level, size in enumerate(level_sizes):
            keys = keys * size + codes_nl[:, level]
        return keys
    order = np.lexsort(codes_nl.T[::-1])
    changed = np.any(codes_nl[order[1:]] != codes_nl[order[:-1]], axis=1)
    keys = np.zeros(len(codes_nl), np.int64)
    keys[order[1:]] = np.cumsum(changed)
    return keys
