# SPDX-License-Identifier: Apache-2.0
"""How well codes are used and how well they tell items apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from recsys.core.errors import DataError
from recsys.retrieval.code_table import check_codes


@dataclass(frozen=True)
class LevelHealth:
    """One level, and the prefixes that end with it.

    Attributes:
        level: from 0.
        size: how many codes it has.
        used: the share of them that at least one item has.
        entropy: of its codes over the items, in bits; at most ``log2(size)``.
        perplexity: ``2^entropy``: as many codes, evenly used, would have the same entropy.
        prefixes: how many distinct tuples of the codes up to this level there are.
        prefix_entropy: of these tuples over the items, in bits.
    """

    level: int
    size: int
    used: float
    entropy: float
    perplexity: float
    prefixes: int
    prefix_entropy: float


@dataclass(frozen=True)
class Health:
    """A catalogue's codes.

    Attributes:
        items: N.
        distinct: how many distinct code tuples the items have.
        levels: one by one.
        colliding: the share of items that share all codes with another one.
        collisions: how many groups they form.
        largest: the number of items in the largest group of equal codes; 1 where none collide.
    """

    items: int
    distinct: int
    levels: tuple[LevelHealth, ...]
    colliding: float
    collisions: int
    largest: int

    def summary(self) -> dict[str, float]:
        """The figures of whole code tuples."""
        return {name: value for name, value in vars(self).items() if name != "levels"}

    def rows(self) -> list[dict[str, float]]:
        """A table: one row for each level, all with the same columns."""
        return [dict(vars(level)) for level in self.levels]


def health(codes_nl: Tensor, level_sizes: Sequence[int]) -> Health:
    """Count codes, prefixes and collisions.

    Args:
        codes_nl: int64 ``[N, L]``: `CodeTokenizer.encode`'s.
        level_sizes: the tokenizer's.

    Raises:
        DataError: no items, or no levels; a code is not one of its level.
    """
    if not len(codes_nl) or not level_sizes:
        raise DataError(f"codes: expected at least one item and one level, got {list(codes_nl.shape)}")
    check_codes(codes_nl, level_sizes)
    prefix = np.zeros(len(codes_nl), np.int64)
    counts = np.array([len(codes_nl)])
    levels = []
    for level, (codes, size) in enumerate(zip(codes_nl.cpu().numpy().T, level_sizes, strict=True)):
        _, code, code_counts = np.unique(codes, return_inverse=True, return_counts=True)
        _, prefix, counts = np.unique(prefix * len(code_counts) + code, return_inverse=True, return_counts=True)
        entropy = _entropy(code_counts)
        levels.append(LevelHealth(level, size, len(code_counts) / size, entropy, 2**entropy, len(counts), _entropy(counts)))
    shared = counts[counts > 1]
    return Health(
        items=len(codes_nl),
        distinct=len(counts),
        levels=tuple(levels),
        colliding=float(shared.sum() / len(codes_nl)),
        collisions=len(shared),
        largest=int(counts.max()),
    )


def _entropy(counts: np.ndarray) -> float:
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0  # not -0.0
