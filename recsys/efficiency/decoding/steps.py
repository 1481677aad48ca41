# SPDX-License-Identifier: Apache-2.0
"""A tree of prefixes read level by level, as beam search over a catalogue reads."""

import torch
from torch import Tensor

from recsys.efficiency.decoding.tree import PrefixTree


class TreeSteps:
    """A `recsys.retrieval.state.PrefixScorer` over a `PrefixTree`: one step costs a forward pass only where a beam was not drafted.

    Args:
        tree: of as many contexts as there are users; its logits must be log-probabilities.
    """

    def __init__(self, tree: PrefixTree) -> None:
        self._tree = tree
        self._beams = [[root] for root in tree.roots]
        self._begun = False

    def step(self, parents_bw: Tensor, codes_bw: Tensor) -> Tensor:
        """float ``[B, W, V]``; see `PrefixScorer.step`."""
        if self._begun:
            steps = [
                (self._beams[user][parent], code)
                for user, row in enumerate(zip(parents_bw.tolist(), codes_bw.tolist(), strict=True))
                for parent, code in zip(*row, strict=True)
            ]
            nodes, width = self._tree.children(steps), parents_bw.shape[1]
            self._beams = [nodes[first : first + width] for first in range(0, len(nodes), width)]
        self._begun = True
        return torch.stack([torch.stack([node.logits for node in row]) for row in self._beams])
