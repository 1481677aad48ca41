# SPDX-License-Identifier: Apache-2.0
"""TokenFormer: what a model says when it grows, and what growing one costs beside training one of its size from nothing."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.frame import Check
from benchmarks.token_efficiency.pruning_needles import seeded
from benchmarks.token_efficiency.routing_sessions import ITEMS, TOKENS, Chain, batches, next_item_loss
from benchmarks.token_efficiency.rows import Row
from recsys.efficiency.cost import Cost
from recsys.efficiency.growth.tokenformer import TokenFormer, grow_optimizer_state

LENGTH, ROWS, EVERY = 24, 16, 10
SMALL, LARGE = 16, 64  # pairs of each projection; four times as many in the feed-forward part


class NextItem(nn.Module):
    """A TokenFormer between embeddings and an output head."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(TOKENS, 32), nn.Linear(32, ITEMS)
        self.former = TokenFormer(TokenFormer.Config(dim=32, layers=2, heads=2, pairs=pairs, ffn_pairs=4 * pairs))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, T, V]``."""
        logits: Tensor = self.head(self.former(self.tokens(tokens)))
        return logits


class Run:
    """A model in training with Adam at a constant rate, and its loss on sessions that it does not train on.

    Args:
        model: it.
        chain: of the sessions.
        seed: of the sessions that it trains on.
    """

    def __init__(self, model: NextItem, chain: Chain, seed: int) -> None:
        self.model, self.sessions = model, batches(chain, ROWS, LENGTH, seed)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        self.held_out = chain.draw(64, LENGTH, seeded(20_000))

    @torch.no_grad()
    def loss(self) -> float:
        """On 64 sessions."""
        return float(next_item_loss(self.model(self.held_out[:, :-1]), self.held_out))

    def train(self, steps: int) -> Iterator[float]:
        """So many steps; the loss after every 10."""
        for step in range(1, steps + 1):
            drawn = next(self.sessions)
            self.optimizer.zero_grad()
            next_item_loss(self.model(drawn[:, :-1]), drawn).backward()
            self.optimizer.step()
            if step % EVERY == 0:
                yield self.loss()

    def step_macs(self) -> int:
        """Multiply-adds of a training step, forward and backward."""
        drawn = next(self.sessions)
        with Cost() as cost:
            next_item_loss(self.model(drawn[:, :-1]), drawn).backward()
        self.optimizer.zero_grad()
        return cost.macs


@dataclass(frozen=True)
class Grown:
    """Multiply-adds over those of training from nothing until the same loss.

    Attributes:
        after: of what came after growing.
        whole: with the small model's training.
        loss: that was to be reached.
        small: the loss of the small model.
    """

    after: float
    whole: float
    loss: float
    small: float


def compared(seed: int, steps: int) -> Grown:
    """Train a small model, grow it, go on; and train a model of the final size from nothing for as many steps as the small one.

    The loss to be reached is the one of the model from nothing in the end; where the grown one does not reach it in as many steps, they
    count.
    """
    chain = Chain(1000 * seed)
    torch.manual_seed(seed)
    scratch = Run(NextItem(LARGE), chain, seed)
    wanted = list(scratch.train(steps))[-1]
    torch.manual_seed(seed)
    grown = Run(NextItem(SMALL), chain, seed)
    small, small_step = list(grown.train(steps))[-1], grown.step_macs()
    grown.model.former.grow(LARGE - SMALL, 4 * (LARGE - SMALL))
    grow_optimizer_state(grown.optimizer)
    taken = 0
    for loss in (small, *grown.train(steps)):
        if loss <= wanted:
            break
        taken += EVERY
    whole = steps * scratch.step_macs()
    after = min(taken, steps) * grown.step_macs()
    return Grown(after / whole, (after + steps * small_step) / whole, wanted, small)


@torch.no_grad()
def jump(seed: int) -> float:
    """The largest change of a float64 model's logits when it grows."""
    torch.manual_seed(seed)
    model, tokens = NextItem(SMALL).double(), Chain(seed).draw(ROWS, LENGTH, seeded(seed))
    before = model(tokens)
    model.former.grow(LARGE - SMALL, 4 * (LARGE - SMALL))
    return float((model(tokens) - before).abs().max())


def tokenformer(seeds: range, steps: int) -> tuple[Row, list[Check]]:
    """Growth from 16 to 64 pairs of each projection."""
    runs, largest = [compared(seed, steps) for seed in seeds], max(jump(seed) for seed in seeds)
    after, whole = statistics.fmean(run.after for run in runs), statistics.fmean(run.whole for run in runs)
    losses = f"loss {statistics.fmean(run.small for run in runs):.3f} small, {statistics.fmean(run.loss for run in runs):.3f} to be reached"
    row = Row(
        "tokenformer",
        f"2 layers, d=32, {SMALL} to {LARGE} pairs, sessions of {LENGTH} tokens, {steps} steps small and {steps} from nothing",
        1 / max(after, 1e-9),
        "training MACs after growing",
        None,
        "10 of training tokens at like perplexity (30B beside 300B), 354M to 1.4B",
        f"{losses}; with the small model's training {whole:.2f} of the MACs from nothing",
    )
    note = (
        f"Cost.macs of training steps until the loss from nothing after {steps} steps: as in the paper, what is spent on the grown model, "
        f"for the small one is in production; with its training {whole:.3f}. "
        f"Each of {len(runs)} seeds: {', '.join(f'{run.after:.3f}' for run in runs)}; {losses}"
    )
    jumped = Check("tokenformer_jump", largest, at_most=1e-10, note=f"largest change of a logit in float64, {len(runs)} models")
    return row, [jumped, Check("tokenformer_compute", round(after, 4), at_most=0.5, note=note)]
