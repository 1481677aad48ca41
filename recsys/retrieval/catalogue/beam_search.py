# SPDX-License-Identifier: Apache-2.0
"""The search itself: from a trie and what is open to whom, to the best leaves of every user."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from kernels.constrained_step import constrained_step
from recsys.core.errors import ConfigError
from recsys.retrieval.catalogue.code_index import check_log_probs
from recsys.retrieval.catalogue.index import Excluded
from recsys.retrieval.catalogue.trie import CodeTrie
from recsys.retrieval.state import PrefixScorer


@dataclass(frozen=True)
class Open:
    """Where beams may go.

    Attributes:
        alive: for each depth 0 … L bool ``[nodes]``: whether any item below may be recommended; None where that holds for all nodes.
        closed: for each depth, pairs (user, node), int64 ``[C]`` each and ascending, below which everything that is alive is excluded for
            the user.
    """

    alive: tuple[Tensor | None, ...]
    closed: tuple[tuple[np.ndarray, np.ndarray], ...]

    @classmethod
    def of(cls, trie: CodeTrie, counts: Sequence[np.ndarray], alive: tuple[Tensor | None, ...], excluded: Excluded) -> Self:
        """From how many items may be recommended below each node, `alive_of` them, and the pairs (user, row) that are excluded."""
        nothing = np.zeros(0, np.int64)
        closed = [(nothing, nothing)] * len(counts)
        for depth, count in enumerate(counts if len(excluded.row) else ()):
            pairs = excluded.query * len(count) + trie.nodes_of(excluded.row, depth)
            pairs, below = np.unique(pairs, return_counts=True)
            pairs = pairs[below == count[pairs % max(len(count), 1)]]
            closed[depth] = (pairs // max(len(count), 1), pairs % max(len(count), 1))
        return cls(alive, tuple(closed))


def alive_of(counts: Sequence[np.ndarray]) -> tuple[Tensor | None, ...]:
    """`Open.alive` of how many items may be recommended below each node."""
    return tuple(None if count.all() else torch.from_numpy(count > 0) for count in counts)


class BeamSearch:
    """Beams over a trie.

    Args:
        trie: the codes.
        where: which nodes are open.
        renormalise: whether probabilities are divided by their sum over the children that the catalogue has.
    """

    def __init__(self, trie: CodeTrie, where: Open, renormalise: bool) -> None:
        self._trie, self._open, self._renormalise = trie, where, renormalise

    def run(self, scorer: PrefixScorer, users: np.ndarray, widths: Sequence[int], children: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """The best leaves.

        Args:
            scorer: with nothing generated yet.
            users: int64 ``[B]``: their numbers, by which errors call them.
            widths: beams kept at each level.
            children: at most so many of each beam; None for all.

        Returns:
            int64 ``[B, W]`` leaves, best first; float32 ``[B, W]`` their scores, -inf where there is none; W is at most the last width.
            And bool ``[B]``: whether anything was left out. Where nothing was, wider beams find the same.

        Raises:
            ConfigError: the scorer knows fewer codes than a level has.
            DataError: it gives what is not a log-probability.
        """
        nodes, scores = torch.zeros(len(users), 1, dtype=torch.int64), torch.zeros(len(users), 1)
        parents = codes = torch.full((len(users), 1), -1)
        cut = torch.zeros(len(users), dtype=torch.bool)
        for level, width in enumerate(widths):
            log_probs = next_log_probs(scorer, parents, codes, level, self._trie.level_sizes[level])
            step = constrained_step(
                log_probs,
                nodes,
                scores,
                self._trie.first_child[level],
                self._trie.code_of[level],
                self._open.alive[level + 1],
                *self._closed(level, len(users)),
                width,
                children,
                self._renormalise,
            )
            check_log_probs(step.scores[:, :1], f"level {level}", users)  # NaN and infinity come first
            cut |= step.cut
            most = max(1, int((step.scores > -torch.inf).sum(1).max())) if len(users) else 1  # no column in which no user has a beam
            nodes, scores, parents = (one[:, :most] for one in step[:3])
            codes = self._trie.code_of[level][nodes]
        return nodes, scores, cut

    def _closed(self, level: int, users: int) -> tuple[Tensor | None, Tensor | None]:
        """The children of a level below which each user has seen everything: where each user's begin, and they, ascending."""
        user, child = self._open.closed[level + 1]
        if not len(user):
            return None, None
        return torch.from_numpy(np.searchsorted(user, np.arange(users + 1))), torch.from_numpy(child)


def children_log_sum(trie: CodeTrie, level: int, nodes_bw: Tensor, log_probs_bwv: Tensor) -> Tensor:
    """``[B, W]``: the logarithm of the probability that falls on the children which the catalogue has; 0 where it is none."""
    starts, codes = trie.first_child[level], trie.code_of[level]
    first = starts[nodes_bw]
    count = starts[nodes_bw + 1] - first
    offset = torch.arange(max(1, int(count.max()) if count.numel() else 1))
    child = (first[..., None] + offset).clamp_(max=len(codes) - 1)
    found = log_probs_bwv.gather(2, codes[child]).masked_fill_(offset >= count[..., None], -torch.inf)
    return found.logsumexp(2).nan_to_num(neginf=0.0)


def next_log_probs(scorer: PrefixScorer, parents_bw: Tensor, codes_bw: Tensor, level: int, size: int) -> Tensor:
    """float32 ``[B, W, V]`` on the host: one step of a scorer.

    Raises:
        ConfigError: V is less than the ``size`` of the level.
    """
    log_probs = scorer.step(parents_bw, codes_bw).float().cpu()
    if log_probs.shape[2] < size:
        raise ConfigError(f"state: level {level} has {size} codes, got log-probabilities of {log_probs.shape[2]}")
    return log_probs
