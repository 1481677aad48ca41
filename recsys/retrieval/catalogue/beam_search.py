# SPDX-License-Identifier: Apache-2.0
"""The search itself: from a trie and what is open to whom, to the best leaves of every user."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from recsys.core.errors import ConfigError
from recsys.retrieval.catalogue.code_index import check_log_probs
from recsys.retrieval.catalogue.index import Excluded
from recsys.retrieval.catalogue.trie import CodeTrie
from recsys.retrieval.state import PrefixScorer

_LAST_NODE = (1 << 32) - 1


@dataclass(frozen=True)
class Open:
    """Where beams may go.

    Attributes:
        alive: for each depth 0 … L bool ``[nodes]``: whether any item below may be recommended; None where that holds for all nodes.
        closed: for each depth, pairs (user, node), int64 ``[C]`` each, below which everything that is alive is excluded for the user.
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
            And bool ``[B]``: whether anything may have been left out. Where nothing was, wider beams find the same.

        Raises:
            ConfigError: the scorer knows fewer codes than a level has.
            DataError: it gives what is not a log-probability.
        """
        nodes, scores = torch.zeros(len(users), 1, dtype=torch.int64), torch.zeros(len(users), 1)
        parents = codes = torch.full((len(users), 1), -1)
        cut = torch.zeros(len(users), dtype=torch.bool)
        for level, width in enumerate(widths):
            log_probs = next_log_probs(scorer, parents, codes, level, self._trie.level_sizes[level])
            candidates, child = self._candidates(level, nodes, scores, log_probs)
            if children is not None and children < candidates.shape[2]:
                candidates, place = _top(candidates, child, children)
                child = child.gather(2, place)
                cut |= (candidates[..., -1] > -torch.inf).any(1)
            scores, place = _top(candidates.flatten(1), child.flatten(1), width)
            check_log_probs(scores[:, :1], f"level {level}", users)  # NaN and infinity come first
            if scores.shape[1] == width:
                cut |= scores[:, -1] > -torch.inf
            parents = place // candidates.shape[2]
            nodes = child.flatten(1).gather(1, place).masked_fill(scores == -torch.inf, 0)
            codes = self._trie.code_of[level][nodes]
        return nodes, scores, cut

    def _candidates(self, level: int, nodes_bw: Tensor, scores_bw: Tensor, log_probs_bwv: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``[B, W, C]`` of the children of each beam, -inf where there is none, and the children's nodes."""
        first, child, found = _children(self._trie, level, nodes_bw, log_probs_bwv)
        if self._renormalise:
            found -= _log_sum(found)[..., None]
        valid = (scores_bw > -torch.inf)[..., None].expand_as(found).clone()
        alive = self._open.alive[level + 1]
        if alive is not None:
            valid &= alive[child]
        self._close(level, nodes_bw, first, valid)
        return found.masked_fill_(~valid, -torch.inf) + scores_bw[..., None], child

    def _close(self, level: int, nodes_bw: Tensor, first_bw: Tensor, valid_bwc: Tensor) -> None:
        """Take out the children below which a user has seen everything."""
        user, child = self._open.closed[level + 1]
        if not len(user):
            return
        starts = self._trie.first_child[level].numpy()
        parent = np.searchsorted(starts, child, side="right") - 1
        size = len(starts)
        beams = (np.arange(len(nodes_bw))[:, None] * size + nodes_bw.numpy()).reshape(-1)
        order = np.argsort(beams, kind="stable")
        wanted = user * size + parent
        left, right = (np.searchsorted(beams[order], wanted, side=side) for side in ("left", "right"))
        repeated = np.repeat(np.arange(len(wanted)), right - left)  # a beam that is none may stand at a node twice
        place = left[repeated] + np.arange(len(repeated)) - np.repeat(np.cumsum(right - left) - (right - left), right - left)
        beam = torch.from_numpy(order[place])
        offset = torch.from_numpy(child[repeated]) - first_bw.reshape(-1)[beam]
        inside = offset < valid_bwc.shape[2]
        valid_bwc.flatten(0, 1)[beam[inside], offset[inside]] = False


def _children(trie: CodeTrie, level: int, nodes_bw: Tensor, log_probs_bwv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first child ``[B, W]`` of each node, all its children, and their log-probabilities ``[B, W, C]``; -inf where there is none."""
    starts, codes = trie.first_child[level], trie.code_of[level]
    first = starts[nodes_bw]
    count = starts[nodes_bw + 1] - first
    offset = torch.arange(max(1, int(count.max()) if count.numel() else 1))
    child = (first[..., None] + offset).clamp_(max=len(codes) - 1)
    return first, child, log_probs_bwv.gather(2, codes[child]).masked_fill_(offset >= count[..., None], -torch.inf)


def children_log_sum(trie: CodeTrie, level: int, nodes_bw: Tensor, log_probs_bwv: Tensor) -> Tensor:
    """``[B, W]``: the logarithm of the probability that falls on the children which the catalogue has; 0 where it is none."""
    return _log_sum(_children(trie, level, nodes_bw, log_probs_bwv)[2])


def _log_sum(found_bwc: Tensor) -> Tensor:
    return found_bwc.logsumexp(2).nan_to_num(neginf=0.0)


def next_log_probs(scorer: PrefixScorer, parents_bw: Tensor, codes_bw: Tensor, level: int, size: int) -> Tensor:
    """float32 ``[B, W, V]`` on the host: one step of a scorer.

    Raises:
        ConfigError: V is less than the ``size`` of the level.
    """
    log_probs = scorer.step(parents_bw, codes_bw).float().cpu()
    if log_probs.shape[2] < size:
        raise ConfigError(f"state: level {level} has {size} codes, got log-probabilities of {log_probs.shape[2]}")
    return log_probs


def _top(scores: Tensor, nodes: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` best of the last dimension, best first, and their places; of equal scores that do not all fit, the smaller nodes."""
    best, place = scores.topk(min(width + 1, scores.shape[-1]))
    if best.shape[-1] > width:
        last, next_one = best[..., width - 1], best[..., width]
        if bool(((last == next_one) & (last > -torch.inf)).any()):  # which of equal ones are the last is open
            place = _keys(scores, nodes).topk(width).indices
            return scores.gather(-1, place), place
    return best[..., :width], place[..., :width]


def _keys(scores: Tensor, nodes: Tensor) -> Tensor:
    """int64: a better score is a larger key, then a smaller node."""
    bits = scores.add(0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) | (_LAST_NODE - nodes)
