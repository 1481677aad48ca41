# SPDX-License-Identifier: Apache-2.0
"""Block styles: how mixers, per-token transformations, norms and residuals make a stack of blocks.

Tensors are ``[B, T, D]`` by shape. Inside a block they lie tokens-outermost in memory, so that the one copy in each mix and revert is
the only transposition.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from recsys.core import components
from recsys.core.config import Config
from recsys.core.errors import ConfigError
from recsys.ranking.mixers import Mixer
from recsys.ranking.part import Penalties
from recsys.ranking.per_token import PerToken


@dataclass(frozen=True)
class Parts:
    """What a stack's blocks are made of.

    Attributes:
        tokens: T.
        dim: D.
        mixer: the configuration of every block's mixer.
        per_token: the configuration of its per-token transformations; None where the style may go without.
    """

    tokens: int
    dim: int
    mixer: Config
    per_token: Config | None

    def new_mixer(self) -> Mixer:
        """A mixer over T tokens of width D."""
        mixer: Mixer = components.build("mixer", self.mixer, self.tokens, self.dim)
        return mixer

    def new_per_token(self, tokens: int | None = None, dim: int | None = None) -> PerToken:
        """A per-token transformation, of T tokens of width D unless told otherwise.

        Raises:
            ConfigError: there is none among the parts.
        """
        if self.per_token is None:
            raise ConfigError("per_token: expected a per-token transformation, got null: this style of block needs one")
        sizes = self.tokens if tokens is None else tokens, self.dim if dim is None else dim
        part: PerToken = components.build("per_token", self.per_token, *sizes)
        return part


class Block(nn.Module, ABC):
    """``[B, T, D] → [B, T, D]``; in training, ``penalties`` collects what its parts add to the loss."""

    @abstractmethod
    def forward(self, x_btd: Tensor, penalties: Penalties = None) -> Tensor:
        """Transform the tokens."""


class Stack(nn.Module, ABC):
    """Blocks one after another. Built as ``cls(config, parts, blocks)`` and registered with ``@register("stack", name)``.

    Attributes:
        normalised: whether the last state has left a norm; otherwise a readout puts one before its mean.
    """

    normalised: ClassVar[bool]

    @abstractmethod
    def forward(self, x_btd: Tensor, penalties: Penalties = None) -> list[Tensor]:
        """The state after every block, each ``[B, T, D]``; the last one is the stack's output."""


class Sequence(Stack):
    """Blocks one after another, with TokenMixer-Large's inter-layer residual.

    X(0) is the input and X(l) the output of block l of L. With gap s, ``X(l) ← X(l) + X(l − s)`` for l = s, 2s, … < L, before the next
    block reads it. The last block's output gets none (the paper). The indexing is ours: X(l − s) is the value that went on from
    there, sum included, so that identity blocks give ``2 ** (number of sums) * X(0)``. A deep stack does not bear that: what the first
    block adds is doubled with the rest while the last block's norm looks at a stream ``2 ** (number of sums)`` too large, so that their
    gradients differ by that factor. ``mean`` takes ``(X(l) + X(l − s)) / 2`` and keeps the amplitude.

    Args:
        blocks: the blocks.
        gap: s, or None for no inter-layer residual.
        mean: halve each sum.

    Raises:
        ConfigError: ``gap`` is below 1.
    """

    def __init__(self, blocks: Iterable[Block], gap: int | None = None, mean: bool = False) -> None:
        super().__init__()
        if gap is not None and gap < 1:
            raise ConfigError(f"inter_residual: expected a gap of at least 1 block, or null, got {gap}")
        self.blocks = nn.ModuleList(blocks)
        self.gap, self.mean = gap, mean

    def forward(self, x_btd: Tensor, penalties: Penalties = None) -> list[Tensor]:
        """X(1), …, X(L), each ``[B, T, D]`` with its inter-layer residual."""
        states = [x_btd]
        for number, block in enumerate(self.blocks, start=1):
            state = block(states[-1], penalties)
            if self.gap is not None and number % self.gap == 0 and number < len(self.blocks):
                state = state + states[number - self.gap]
                state = state / 2 if self.mean else state
            states.append(state)
        return states[1:]
