# SPDX-License-Identifier: Apache-2.0
"""The interface of mixers: how information moves between tokens."""

from abc import abstractmethod

from torch import Tensor

from recsys.ranking.part import TokenPart


class Mixer(TokenPart):
    """``[B, T, D] → [B, mixed_tokens, mixed_dim]``.

    Both sizes equal ``(T, D)``, except in `TokenMix` with as many heads as it likes. Built as ``cls(config, tokens, dim)``. By shape a
    tensor is ``[B, T, D]``; write it tokens-outermost in memory where that costs nothing, the order in which the batched products of
    `recsys.ranking.per_token` read it.

    Args:
        tokens: T.
        dim: D.
    """

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__(tokens, dim)
        self.mixed_tokens, self.mixed_dim = tokens, dim

    @abstractmethod
    def forward(self, x_btd: Tensor) -> Tensor:
        """Mix the tokens of each row of the batch."""


class ReversibleMixer(Mixer):
    """A mixer with an inverse, as the block style `mix_revert` needs. It has no parameters."""

    @property
    def flops(self) -> int:
        """None: coordinates change places."""
        return 0

    @abstractmethod
    def parts(self, x_btd: Tensor) -> Tensor:
        """The mixed tokens as a view: whole, or ``[B, mixed_tokens, P, w]`` with ``P * w`` = ``mixed_dim``. See `PerToken.residual`."""

    @abstractmethod
    def join(self, x_bhpw: Tensor) -> Tensor:
        """The inverse of `parts`, ``[B, T, D]``; a view where the parts lie outermost in memory."""

    @abstractmethod
    def revert(self, x_bhd: Tensor) -> Tensor:
        """``[B, mixed_tokens, mixed_dim] → [B, T, D]``, the inverse of `forward`."""
