# SPDX-License-Identifier: Apache-2.0
"""Token Recycling (Luo et al., ACL 2025, arXiv 2408.08696): drafts from the successors that earlier passes found likely; and a trie's."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from recsys.core.errors import ConfigError
from recsys.efficiency.decoding.tree import Draft

# Level sizes of the authors' tree of 80 nodes under the last token.
LEVELS = (8, 21, 25, 15, 8, 3)


def template(level_sizes: Sequence[int], successors: int) -> list[list[tuple[int, int]]]:
    """A static tree, level by level: for each node its parent's place in the level above, and its rank among the parent's successors.

    The paths of lowest total rank stay at each level, of equal ones those with the smaller first ranks. (The authors' tree was found by
    measuring; its paths are given in their code only, its level sizes are the default here.)

    Raises:
        ConfigError: a level is larger than the one above times ``successors``.
    """
    levels: list[list[tuple[int, int]]] = []
    paths: list[tuple[int, ...]] = [()]
    for depth, size in enumerate(level_sizes):
        grown = sorted(((*path, rank), at) for at, path in enumerate(paths) for rank in range(successors))
        if not 1 <= size <= len(grown):
            raise ConfigError(f"level_sizes: level {depth}: expected 1 to {len(grown)}, got {size}")
        grown = sorted(sorted(grown, key=lambda own: (sum(own[0]), own[0]))[:size], key=lambda own: own[0])
        levels.append([(at, path[-1]) for path, at in grown])
        paths = [path for path, _ in grown]
    return levels


class AdjacencyDraft:
    """A matrix of the k tokens that were last found likeliest after each token, read breadth-first along a static tree.

    Every scored prefix, asked for or drafted, refreshes its last token's row; of equal tokens in one pass the last prefix stays. The
    matrix lives on from one request to the next, and any content of it is right.

    Differs from the paper: with ``levels`` > 1, rows are by the level at which a token stands, for codes whose meaning depends on it; a
    draft that ``allowed`` forbids is dropped with what hangs from it.

    Args:
        vocabulary: V.
        successors: k.
        levels: how many levels an item's codes have; 1 where a token means the same everywhere.
        level_sizes: of the static tree.
        allowed: from a prefix to the tokens that may follow, bool ``[V]``; None for all.

    Attributes:
        matrix: int32 ``[levels, V + 1, k]``, -1 where nothing is known; the last row is that of what stands before the first token.
    """

    def __init__(
        self,
        vocabulary: int,
        successors: int = 8,
        levels: int = 1,
        level_sizes: Sequence[int] = LEVELS,
        allowed: Callable[[Sequence[int]], Tensor] | None = None,
    ) -> None:
        if not 1 <= successors <= vocabulary:
            raise ConfigError(f"successors: expected 1 to {vocabulary}, got {successors}")
        self.matrix = torch.full((levels, vocabulary + 1, successors), -1, dtype=torch.int32)
        self._template, self._allowed = template(level_sizes, successors), allowed

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.matrix.numel() * self.matrix.element_size()

    def propose(self, prefix: Sequence[int], depth: int) -> Draft:
        """See `DraftSource.propose`."""
        parents: list[int] = []
        tokens: list[int] = []
        above: list[tuple[int, list[int]] | None] = [(-1, list(prefix))]
        for level in self._template[: max(depth, 0)]:
            below: list[tuple[int, list[int]] | None] = []
            rows = [None if own is None else self._row(own[1]).tolist() for own in above]
            masks = [None if own is None or self._allowed is None else self._allowed(own[1]) for own in above]
            for at, rank in level:
                own, row, mask = above[at], rows[at], masks[at]
                token = -1 if row is None else row[rank]
                if own is None or token < 0 or (mask is not None and not bool(mask[token])):
                    below.append(None)
                    continue
                below.append((len(tokens), [*own[1], token]))
                parents.append(own[0])
                tokens.append(token)
            above = below
        return Draft(parents, tokens)

    def observe(self, depths: Tensor, tokens: Tensor, logits: Tensor) -> None:
        """See `DraftSource.observe`."""
        found = logits.topk(self.matrix.shape[2])
        successors = found.indices.masked_fill(found.values == -torch.inf, -1).int()  # what cannot follow is no successor
        levels, rows = self._places(depths, tokens)
        _, key = torch.unique(levels * self.matrix.shape[1] + rows, return_inverse=True)
        number = torch.arange(len(key), device=key.device)
        last = number.new_zeros(int(key.max()) + 1).scatter_reduce(0, key, number, "amax")
        self.matrix[levels[last], rows[last]] = successors[last].to(self.matrix.device)

    def _row(self, prefix: Sequence[int]) -> Tensor:
        level, row = self._places(torch.tensor([len(prefix)]), torch.tensor(list(prefix[-1:]) or [0]))
        found: Tensor = self.matrix[level[0], row[0]]
        return found

    def _places(self, depths: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Where the successors of tokens at these depths stand; depth 0 is what stands before the first token."""
        return (depths - 1).clamp(min=0) % len(self.matrix), torch.where(depths == 0, self.matrix.shape[1] - 1, tokens)


class TrieDraft:
    """Drafts what a catalogue's trie has below a prefix, breadth-first, until ``nodes`` are drafted.

    Where few items share a prefix, as in the last levels of most catalogues, this is all that can follow.

    Args:
        children: from a prefix to the tokens that lead on to items.
        nodes: most drafted nodes.
    """

    def __init__(self, children: Callable[[Sequence[int]], Iterable[int]], nodes: int = 16) -> None:
        if nodes < 1:
            raise ConfigError(f"nodes: expected at least 1, got {nodes}")
        self._children, self._nodes = children, nodes

    def propose(self, prefix: Sequence[int], depth: int) -> Draft:
        """See `DraftSource.propose`."""
        parents: list[int] = []
        tokens: list[int] = []
        level = [(-1, list(prefix))]
        for _ in range(depth):
            below = [(number, [*path, token]) for number, path in level for token in self._children(path)]
            below = below[: self._nodes - len(tokens)]
            first = len(tokens)
            parents += [number for number, _ in below]
            tokens += [path[-1] for _, path in below]
            level = [(first + i, path) for i, (_, path) in enumerate(below)]
        return Draft(parents, tokens)

    def observe(self, depths: Tensor, tokens: Tensor, logits: Tensor) -> None:
        """A trie learns nothing."""
