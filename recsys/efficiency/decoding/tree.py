# SPDX-License-Identifier: Apache-2.0
"""A tree of prefixes with the logits behind each: what greedy and beam search read, and what drafts fill ahead of them.

A draft only puts logits into the tree that somebody may ask for later. Whoever decodes asks as if there were no drafts, so that the
result is the same with good drafts, bad ones and none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from recsys.core.errors import ConfigError


class NodeScorer(Protocol):
    """A decoder that scores any nodes of the trees of prefixes below its contexts in one forward pass (tree attention).

    A node sees its context, its ancestors and itself.
    """

    def extend(self, contexts: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
        """Add n nodes and score what may follow each.

        Args:
            contexts: int64 ``[n]``, the number of the context (a user, a request) that each node belongs to.
            parents: int64 ``[n]``, the number of each node's parent; -1 for the context itself. A parent may come earlier in the same call.
            tokens: int64 ``[n]``.

        Returns:
            float ``[n, V]`` logits. The new nodes are numbered on from those that there are.
        """
        ...

    def keep(self, nodes: Tensor) -> None:
        """Forget all nodes but these, int64 ``[m]``, parents before their children; they are numbered anew from 0."""
        ...


@dataclass(frozen=True)
class Draft:
    """Nodes below some node that may be asked for next.

    Attributes:
        parents: for each drafted node its parent's number among the drafted ones, -1 for the node that it hangs from; parents come first.
        tokens: for each drafted node.
    """

    parents: list[int]
    tokens: list[int]


class DraftSource(Protocol):
    """Guesses what is asked for next, and learns from what was computed."""

    def propose(self, prefix: Sequence[int], depth: int) -> Draft:
        """A draft below the node of a prefix (without the start token), at most ``depth`` tokens deep."""
        ...

    def observe(self, depths: Tensor, tokens: Tensor, logits: Tensor) -> None:
        """Learn from nodes int64 ``[n]`` at these depths (1 for the first token), and their logits ``[n, V]``."""
        ...


@dataclass
class Counts:
    """What a decoding cost.

    Attributes:
        forwards: calls of the scorer.
        nodes: prefixes that were scored.
        asked: prefixes that were asked for.
    """

    forwards: int = 0
    nodes: int = 0
    asked: int = 0


@dataclass
class _Node:
    token: int
    parent: "_Node | None"
    context: int
    number: int
    logits: Tensor
    children: dict[int, "_Node"] = field(default_factory=dict)

    def path(self) -> list["_Node"]:
        """From the root's child to the node itself; empty for the root."""
        found, node = [], self
        while node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]

    def prefix(self) -> list[int]:
        return [node.token for node in self.path()]


class PrefixTree:
    """Logits by prefix, computed when they are first asked for, together with what the sources guess will be asked next.

    Args:
        scorer: of the contexts.
        start: the token that stands before the first one.
        sources: of drafts.
        depth: how many tokens are decoded at most; no draft goes further.
        contexts: how many there are; one pass serves all of them.

    Attributes:
        counts: the cost so far.
        roots: for each context the prefix without tokens.
    """

    def __init__(
        self, scorer: NodeScorer, start: int, sources: Sequence[DraftSource] = (), depth: int = 1 << 30, contexts: int = 1
    ) -> None:
        if depth < 1 or contexts < 1:
            raise ConfigError(f"depth, contexts: expected at least 1, got {depth} and {contexts}")
        self._scorer, self._sources, self._depth = scorer, sources, depth
        self.counts = Counts()
        self._next = 0
        self.roots = [_Node(start, None, context, -1, torch.zeros(0)) for context in range(contexts)]
        self._score(self.roots)

    @property
    def root(self) -> _Node:
        """The prefix without tokens, of the first context."""
        return self.roots[0]

    def children(self, wanted: Sequence[tuple[_Node, int]]) -> list[_Node]:
        """The nodes that these tokens lead to from these nodes; those that are not there yet are scored in one pass."""
        self.counts.asked += len(wanted)
        missing = [self._add(node, token) for node, token in wanted if token not in node.children]
        if missing:
            self._score(missing)
        return [node.children[token] for node, token in wanted]

    def keep(self, nodes: Sequence[_Node]) -> None:
        """Forget everything but these nodes and their ancestors, and what their caches hold."""
        kept = {root.number: root for root in self.roots}
        for node in nodes:
            kept |= {own.number: own for own in node.path()}
        ordered = [kept[number] for number in sorted(kept)]
        for node in ordered:
            node.children = {token: child for token, child in node.children.items() if child.number in kept}
        self._scorer.keep(torch.tensor([node.number for node in ordered]))
        for number, node in enumerate(ordered):
            node.number = number
        self._next = len(ordered)

    def _score(self, wanted: Sequence[_Node]) -> None:
        """One forward pass over nodes that are wanted and those that are drafted below them."""
        new = [own for node in wanted for own in (node, *self._drafted(node))]
        for node in new:
            node.number, self._next = self._next, self._next + 1
        parents = torch.tensor([-1 if node.parent is None else node.parent.number for node in new])
        tokens = torch.tensor([node.token for node in new])
        logits = self._scorer.extend(torch.tensor([node.context for node in new]), parents, tokens)
        for node, own in zip(new, logits, strict=True):
            node.logits = own
        self.counts.forwards += 1
        self.counts.nodes += len(new)
        depths = torch.tensor([len(node.path()) for node in new])
        for source in self._sources:
            source.observe(depths, tokens, logits)

    def _add(self, parent: _Node, token: int) -> _Node:
        node = _Node(token, parent, parent.context, -1, torch.zeros(0))
        parent.children[token] = node
        return node

    def _drafted(self, node: _Node) -> list[_Node]:
        """New nodes below a node, by all sources; what one has drafted already is not added again."""
        prefix, new = node.prefix(), []
        for source in self._sources:
            draft = source.propose(prefix, self._depth - 1 - len(prefix))
            placed: list[_Node] = []
            for parent, token in zip(draft.parents, draft.tokens, strict=True):
                above = node if parent < 0 else placed[parent]
                child = above.children.get(token)
                if child is None:
                    child = self._add(above, token)
                    new.append(child)
                placed.append(child)
        return new
