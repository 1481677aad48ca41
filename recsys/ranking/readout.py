# SPDX-License-Identifier: Apache-2.0
"""Readouts: from the last tokens to the logits."""

from abc import abstractmethod

from torch import Tensor, nn

from recsys.core import components
from recsys.core.config import Config as BaseConfig
from recsys.ranking.heads import Head
from recsys.ranking.part import Part, TokenNorm


class Readout(Part):
    """One vector from all tokens, then a head: ``[B, T, D] → [B, tasks]``.

    Args:
        dim: D.
        width: of the vector.
        tasks: how many.
        head: the configuration of the head.
        norm: whether an RMSNorm over each token comes first. It is ours: a pre-norm stack leaves its stream unnormalised, and each
            inter-layer residual about doubles it.
    """

    def __init__(self, dim: int, width: int, tasks: int, head: BaseConfig, norm: bool) -> None:
        super().__init__()
        self.norm = TokenNorm(dim) if norm else nn.Identity()
        self.head: Head = components.build("head", head, width, tasks)

    @property
    def flops(self) -> int:
        """Those of the head."""
        return self.head.flops

    @abstractmethod
    def pool(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, width]``."""

    def forward(self, x_btd: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.pool(self.norm(x_btd)))
        return logits


class MeanReadout(Readout):
    """Mean over tokens, then a head. The arguments are `Readout`'s; the vector's width is D."""

    def __init__(self, dim: int, tasks: int, head: BaseConfig, norm: bool) -> None:
        super().__init__(dim, dim, tasks, head, norm)

    def pool(self, x_btd: Tensor) -> Tensor:
        """The mean over tokens."""
        return x_btd.mean(dim=1)


class FlattenReadout(Readout):
    """The tokens one after another, then a head. The arguments are `Readout`'s; the vector's width is T D.

    Args:
        tokens: T.
    """

    def __init__(self, tokens: int, dim: int, tasks: int, head: BaseConfig, norm: bool) -> None:
        super().__init__(dim, tokens * dim, tasks, head, norm)

    def pool(self, x_btd: Tensor) -> Tensor:
        """Token 0's channels, then token 1's, and so on."""
        return x_btd.flatten(1)
