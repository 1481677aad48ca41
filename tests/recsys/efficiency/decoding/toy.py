# SPDX-License-Identifier: Apache-2.0
"""A small causal transformer in float64 that scores trees of prefixes, and the same sequentially."""

import math

import torch
from torch import Tensor


class Toy:
    """Two layers of one-head attention over a context and what was generated, with sinusoidal positions.

    Args:
        vocabulary: V.
        seed: of the weights.
        sharp: scale of the logits.
    """

    def __init__(self, vocabulary: int, seed: int, sharp: float = 4.0, dim: int = 16) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.vocabulary, self.dim, self.sharp = vocabulary, dim, sharp
        self.embedding = torch.randn(vocabulary + 1, dim, generator=draw, dtype=torch.float64)
        self.layers = [[torch.randn(dim, dim, generator=draw, dtype=torch.float64) / dim**0.5 for _ in range(4)] for _ in range(2)]

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        rates = torch.exp(-math.log(100.0) * torch.arange(self.dim // 2, dtype=torch.float64) / self.dim)
        angles = positions[:, None].double() * rates
        return self.embedding[tokens] + 0.5 * torch.cat((angles.sin(), angles.cos()), 1)

    def run(self, x: Tensor, mask: Tensor, past: list[tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits of new rows that see the past and themselves by ``mask`` ``[new, past + new]``, and all keys and values."""
        kept = []
        for i, (q, k, v, o) in enumerate(self.layers):
            key, value = x @ k, x @ v
            if past is not None:
                key, value = torch.cat((past[i][0], key)), torch.cat((past[i][1], value))
            kept.append((key, value))
            weights = ((x @ q) @ key.T / self.dim**0.5).masked_fill(~mask, -torch.inf).softmax(1)
            x = x + torch.tanh(weights @ value @ o)
        return self.sharp * x @ self.embedding[: self.vocabulary].T / self.dim**0.5, kept

    def logits(self, context: list[int], prefix: list[int]) -> Tensor:
        """Of the token after context, start token and prefix, computed from nothing."""
        tokens = torch.tensor([*context, self.vocabulary, *prefix])
        count = len(tokens)
        return self.run(self.embed(tokens, torch.arange(count)), torch.ones(count, count).tril().bool())[0][-1]


class ToyNodes:
    """`Toy` as a `NodeScorer` of one context, with keys and values of all nodes kept."""

    def __init__(self, toy: Toy, context: list[int]) -> None:
        self.toy, self.base, self.calls = toy, len(context), 0
        tokens = torch.tensor(context)
        _, self.past = toy.run(toy.embed(tokens, torch.arange(self.base)), torch.ones(self.base, self.base).tril().bool())
        self.sees = torch.zeros(0, 0, dtype=torch.bool)  # [nodes, nodes]: ancestors and the node itself

    def extend(self, contexts: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
        assert not contexts.any()
        old, new = len(self.sees), len(parents)
        sees = torch.zeros(old + new, old + new, dtype=torch.bool)
        sees[:old, :old] = self.sees
        for i, parent in enumerate(parents.tolist()):
            if parent >= 0:
                sees[old + i] = sees[parent]
            sees[old + i, old + i] = True
        self.sees = sees
        mask = torch.cat((torch.ones(new, self.base, dtype=torch.bool), sees[old:]), 1)
        positions = self.base + sees[old:].sum(1) - 1
        logits, self.past = self.toy.run(self.toy.embed(tokens, positions), mask, self.past)
        self.calls += 1
        return logits

    def keep(self, nodes: Tensor) -> None:
        self.sees = self.sees[nodes][:, nodes]
        rows = torch.cat((torch.arange(self.base), self.base + nodes))
        self.past = [(key[rows], value[rows]) for key, value in self.past]
