# SPDX-License-Identifier: Apache-2.0
"""Sessions drawn from Markov chains, and a small causal transformer that also scores trees of prefixes."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.token_efficiency.pruning_needles import fit, seeded

ITEMS, THEMES, SUCCESSORS = 64, 4, 8
TOKENS = ITEMS + THEMES
Past = list[tuple[Tensor, Tensor]]


class Chain:
    """Sessions of items: a theme comes first, and says which of 8 successors of an item are the likely ones.

    Args:
        seed: of the successors.
    """

    def __init__(self, seed: int) -> None:
        self.successors = torch.stack([torch.randperm(ITEMS, generator=seeded(seed + item))[:SUCCESSORS] for item in range(ITEMS)])
        weights = 0.5 ** torch.arange(SUCCESSORS)
        self.weights = torch.stack([weights.roll(2 * theme) for theme in range(THEMES)])

    def draw(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        """int64 ``[B, N]``: a theme, then N - 1 items."""
        theme = torch.randint(THEMES, (rows,), generator=generator)
        found = [ITEMS + theme, torch.randint(ITEMS, (rows,), generator=generator)]
        while len(found) < length:
            rank = torch.multinomial(self.weights[theme], 1, generator=generator)
            found.append(self.successors[found[-1]].gather(1, rank)[:, 0])
        return torch.stack(found, 1)


class Decoder(nn.Module):
    """A pre-norm transformer over tokens, with keys and values handed in and out.

    Args:
        tokens: of the vocabulary.
        places: positions there are.
        classes: of the output.
        dim: d.
        layers: how many.
        heads: of the attention.
    """

    def __init__(self, tokens: int, places: int, classes: int, dim: int = 32, layers: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.tokens, self.places = nn.Embedding(tokens, dim), nn.Embedding(places, dim)
        nn.init.normal_(self.places.weight, std=0.1)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * layers + 1))
        self.projections = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(layers))
        self.outs = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.networks = nn.ModuleList(nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)) for _ in range(layers))
        self.head = nn.Linear(dim, classes)

    def run(self, tokens: Tensor, places: Tensor, mask: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """Hidden states ``[…, T, d]``, and all keys and values; each token reads past and new ones by ``mask`` ``[T, past + T]``."""
        x, kept = self.tokens(tokens) + self.places(places), []
        for layer, (project, out, network) in enumerate(zip(self.projections, self.outs, self.networks, strict=True)):
            parts = project(self.norms[2 * layer](x)).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in parts)
            if past is not None:
                k, v = torch.cat((past[layer][0], k), -2), torch.cat((past[layer][1], v), -2)
            kept.append((k, v))
            made = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + out(made.transpose(-3, -2).flatten(-2))
            x = x + network(self.norms[2 * layer + 1](x))
        return self.norms[-1](x), kept

    def states(self, tokens: Tensor) -> Tensor:
        """Hidden states ``[B, T, d]`` of sequences ``[B, T]``, each token seeing those up to it."""
        length = tokens.shape[1]
        return self.run(tokens, torch.arange(length), torch.ones(length, length, dtype=torch.bool).tril())[0]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, T, classes]``."""
        logits: Tensor = self.head(self.states(tokens))
        return logits


class TreeNodes:
    """A `Decoder` as a `NodeScorer` of one context, with keys and values of all nodes kept."""

    def __init__(self, model: Decoder, context: Tensor) -> None:
        self.model, self.base = model, len(context)
        mask = torch.ones(self.base, self.base, dtype=torch.bool).tril()
        _, self.past = model.run(context, torch.arange(self.base), mask)
        self.sees = torch.zeros(0, 0, dtype=torch.bool)

    def extend(self, contexts: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
        """See `NodeScorer.extend`."""
        old, new = len(self.sees), len(parents)
        sees = F.pad(self.sees, (0, new, 0, new))
        for number, parent in enumerate(parents.tolist(), old):
            if parent >= 0:
                sees[number] = sees[parent]
            sees[number, number] = True
        self.sees = sees
        mask = torch.cat((torch.ones(new, self.base, dtype=torch.bool), sees[old:]), 1)
        hidden, self.past = self.model.run(tokens, self.base + sees[old:].sum(1) - 1, mask, self.past)
        logits: Tensor = self.model.head(hidden)
        return logits

    def keep(self, nodes: Tensor) -> None:
        """See `NodeScorer.keep`."""
        self.sees = self.sees[nodes][:, nodes]
        rows = torch.cat((torch.arange(self.base), self.base + nodes))
        self.past = [(key[:, rows], value[:, rows]) for key, value in self.past]


def next_item_loss(logits: Tensor, sessions: Tensor) -> Tensor:
    """Cross-entropy of logits ``[B, T - 1, V]`` with the items after each token of sessions ``[B, T]``; a theme is never asked for."""
    return F.cross_entropy(logits.flatten(0, 1), sessions[:, 1:].flatten())


def batches(chain: Chain, rows: int, length: int, seed: int) -> Iterator[Tensor]:
    """Ever new sessions."""
    generator = seeded(seed)
    while True:
        yield chain.draw(rows, length, generator)


def trained_decoder(seed: int, steps: int, places: int, rows: int = 12) -> tuple[Decoder, Chain]:
    """A decoder that learned a chain a little from sessions of ``places`` tokens, and the chain."""
    torch.manual_seed(seed)
    chain, model = Chain(1000 * seed), Decoder(TOKENS, places, ITEMS)
    sessions = batches(chain, rows, places, seed)

    def loss() -> Tensor:
        drawn = next(sessions)
        return next_item_loss(model(drawn[:, :-1]), drawn)

    fit(model.parameters(), steps, loss)
    return model.eval(), chain
