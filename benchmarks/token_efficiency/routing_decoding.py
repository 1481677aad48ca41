# SPDX-License-Identifier: Apache-2.0
"""Token Recycling: forward passes of greedy decoding of sessions, with drafts and without."""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.frame import Check
from benchmarks.token_efficiency.pruning_needles import seeded
from benchmarks.token_efficiency.routing_sessions import ITEMS, TOKENS, Decoder, TreeNodes, trained_decoder
from benchmarks.token_efficiency.rows import Row, beside
from recsys.efficiency.decoding.search import greedy
from recsys.efficiency.decoding.token_recycling import AdjacencyDraft
from recsys.efficiency.decoding.tree import Counts, PrefixTree

CONTEXT, LENGTH, PUBLISHED_VOCABULARY = 8, 40, 32_000
LIMIT = 2 * 2**20


@torch.no_grad()
def decode(model: Decoder, session: Tensor, sources: Sequence[AdjacencyDraft]) -> tuple[list[int], Counts]:
    """The likeliest 40 items after a session of 8 tokens, and what it took."""
    tree = PrefixTree(TreeNodes(model, session[:-1]), int(session[-1]), sources, LENGTH)
    found = greedy(tree, LENGTH)
    return found, tree.counts


def compared(model: Decoder, sessions: Tensor) -> tuple[float, float, bool]:
    """Forward passes with drafts over those without, prefixes scored for each item, and whether all items are the same."""
    draft = AdjacencyDraft(TOKENS)
    passes, plain, scored, same = 0, 0, 0, True
    for session in sessions:
        wanted, without = decode(model, session, ())
        found, counts = decode(model, session, (draft,))
        passes, plain, scored, same = passes + counts.forwards, plain + without.forwards, scored + counts.nodes, same and found == wanted
    return passes / plain, scored / (len(sessions) * LENGTH), same


def token_recycling(seeds: range, steps: int = 150, users: int = 8) -> tuple[Row, Check]:
    """Users one after another, the matrix of successors empty before the first; time with the matrix of the last ones."""
    trained = [trained_decoder(seed, steps, CONTEXT + LENGTH) for seed in seeds]
    drawn = [(m.double(), chain.draw(users, CONTEXT, seeded(20_000 + seed))) for seed, (m, chain) in zip(seeds, trained, strict=True)]
    runs = [compared(model, sessions) for model, sessions in drawn]
    share, scored, same = statistics.fmean(run[0] for run in runs), statistics.fmean(run[1] for run in runs), all(run[2] for run in runs)
    matrix, published = AdjacencyDraft(TOKENS), AdjacencyDraft(PUBLISHED_VOCABULARY)
    within = matrix.nbytes < LIMIT and published.nbytes < LIMIT
    model, sessions = drawn[0][0], drawn[0][1][:2]
    for session in sessions:
        decode(model, session, (matrix,))
    wall = beside(lambda: [decode(model, s, ()) for s in sessions], lambda: [decode(model, s, (matrix,)) for s in sessions])
    told = f"{'the same' if same else 'other'} items for {users * len(runs)} users, {scored:.1f} prefixes scored for each item"
    memory = f"{matrix.nbytes / 2**10:.1f} KiB of successors, {published.nbytes / 2**20:.2f} MiB for {PUBLISHED_VOCABULARY:,} tokens"
    row = Row(
        "token_recycling",
        f"{LENGTH} items of {ITEMS} after {CONTEXT} tokens, 2 layers of d=32 in float64, 8 successors, tree of 80; {memory}",
        1 / share,
        "forwards",
        wall,
        "2.09 of tokens a second, Spec-Bench, Vicuna-7B, 1.95 MB",
        told,
    )
    note = f"PrefixTree.counts.forwards, with drafts over without, over {len(runs)} models: {share:.3f}; {told}; {memory}"
    return row, Check("token_recycling_forwards", round(share, 4) if same and within else 1.0, at_most=0.5, note=note)
