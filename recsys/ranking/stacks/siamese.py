# SPDX-License-Identifier: Apache-2.0
"""SiameseNorm (arXiv 2602.08064), as UniMixer uses it: one stream that is normalised at every block, beside one that never is."""

from typing import ClassVar, Literal

from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.ranking.part import Penalties, TokenNorm
from recsys.ranking.stacks.base import Block, Parts, Stack
from recsys.ranking.stacks.residual import same_shape


class UniMixerBlock(Block):
    """The block of UniMixer, whose outer residual is the stack's (arXiv 2604.00590, §4.4).

    ``O = F(RMSNorm(X + mix(X)))``, and without F ``O = RMSNorm(X + mix(X))``.

    Args:
        parts: T, D, mixer and F.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.mixer, self.norm = same_shape(parts), TokenNorm(parts.dim)
        self.per_token = parts.new_per_token() if parts.per_token is not None else None

    def forward(self, x_btd: Tensor, penalties: Penalties = None) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        s_btd: Tensor = self.norm(x_btd + self.mixer(x_btd))
        if self.per_token is None:
            return s_btd
        out_btd: Tensor = self.per_token(s_btd, penalties)
        return out_btd


@register("stack", "siamese")
class Siamese(Stack):
    """M blocks between two coupled streams (arXiv 2604.00590, §4.5).

    ::

        X̄_0 = Ȳ_0 = X
        O_l = block(X̄_l + RMSNorm(Ȳ_l))
        X̄_{l+1} = RMSNorm(X̄_l + O_l)
        Ȳ_{l+1} = Ȳ_l + O_l
        output  = X̄_M + RMSNorm(Ȳ_M)

    The state after block l is ``X̄_l + RMSNorm(Ȳ_l)``, so that every state is what the next block reads, and the last one the output.
    With blocks that give zero the output is ``2 · RMSNorm(X)``. Some notes on the paper swap the names of the streams.
    """

    class Config(BaseConfig):
        """Nothing to choose."""

        name: Literal["siamese"] = "siamese"

    normalised: ClassVar[bool] = True

    def __init__(self, config: Config, parts: Parts, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(UniMixerBlock(parts) for _ in range(blocks))
        self.stream_norms = nn.ModuleList(TokenNorm(parts.dim) for _ in range(blocks))
        self.read_norms = nn.ModuleList(TokenNorm(parts.dim) for _ in range(blocks + 1))

    def forward(self, x_btd: Tensor, penalties: Penalties = None) -> list[Tensor]:
        """The state after every block."""
        normed_btd = raw_btd = x_btd
        state_btd = normed_btd + self.read_norms[0](raw_btd)
        states = []
        for block, stream_norm, read_norm in zip(self.blocks, self.stream_norms, self.read_norms[1:], strict=True):
            out_btd = block(state_btd, penalties)
            normed_btd, raw_btd = stream_norm(normed_btd + out_btd), raw_btd + out_btd
            state_btd = normed_btd + read_norm(raw_btd)
            states.append(state_btd)
        return states
