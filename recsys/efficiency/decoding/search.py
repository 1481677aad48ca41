# SPDX-License-Identifier: Apache-2.0
"""Greedy and beam search over a `PrefixTree`, free or held to what a catalogue allows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from recsys.core.errors import ConfigError, DataError
from recsys.efficiency.decoding.tree import PrefixTree

Allowed: TypeAlias = Callable[[Sequence[int]], Tensor]
"""From a prefix to bool ``[V]``, the tokens that may follow it."""


@dataclass(frozen=True)
class Beams:
    """What beam search found, best first.

    Attributes:
        tokens: int64 ``[W, L]``.
        scores: ``[W]`` sums of log-probabilities (over all tokens, allowed or not).
    """

    tokens: Tensor
    scores: Tensor


def greedy(tree: PrefixTree, length: int, allowed: Allowed | None = None, end: int | None = None, window: int = 512) -> list[int]:
    """The likeliest token after each prefix, of equal ones the smallest, until ``length`` tokens or ``end``.

    Args:
        tree: over one context.
        length: most tokens.
        allowed: what may follow; None for everything.
        end: a token after which nothing follows; it is the last one returned.
        window: once the tree has so many prefixes beside the path, they are forgotten.

    Raises:
        ConfigError: ``length`` is below 1.
        DataError: nothing is allowed after a prefix.
    """
    if length < 1:
        raise ConfigError(f"length: expected at least 1, got {length}")
    node, found, scored = tree.root, list[int](), 0
    while True:
        logits = _masked(node.logits, found, allowed)
        found.append(int(logits.argmax()))
        if len(found) == length or found[-1] == end:
            return found
        if found[-1] not in node.children and tree.counts.nodes - scored > window:
            tree.keep([node])
            scored = tree.counts.nodes
        (node,) = tree.children([(node, found[-1])])


def beam(tree: PrefixTree, width: int, length: int, allowed: Allowed | None = None) -> Beams:
    """The ``width`` best sequences of ``length`` tokens that a beam of that width finds; at equal scores the smaller tokens.

    Raises:
        ConfigError: ``width`` or ``length`` is below 1.
        DataError: nothing is allowed.
    """
    if width < 1 or length < 1:
        raise ConfigError(f"width, length: expected at least 1, got {width} and {length}")
    nodes, scores = [tree.root], tree.root.logits.new_zeros(1)
    prefixes: list[list[int]] = [[]]
    for level in range(length):
        log_probs = torch.stack([_masked(n.logits.log_softmax(-1), p, allowed) for n, p in zip(nodes, prefixes, strict=True)])
        total = (scores[:, None] + log_probs).flatten()
        order = total.sort(descending=True, stable=True)
        count = min(width, int((order.values > -torch.inf).sum()))
        place, scores = order.indices[:count].tolist(), order.values[:count]
        steps = [divmod(p, log_probs.shape[1]) for p in place]
        prefixes = [[*prefixes[beam_], token] for beam_, token in steps]
        if level + 1 < length:
            nodes = tree.children([(nodes[beam_], token) for beam_, token in steps])
    return Beams(torch.tensor(prefixes, device=scores.device), scores)


def _masked(scores: Tensor, prefix: Sequence[int], allowed: Allowed | None) -> Tensor:
    if allowed is None:
        return scores
    mask = allowed(prefix)
    if not bool(mask.any()):
        raise DataError(f"decode: nothing is allowed after {list(prefix)}")
    return scores.masked_fill(~mask, -torch.inf)
