# SPDX-License-Identifier: Apache-2.0
"""The block style of TokenMixer-Large: mix, transform mixed tokens, revert, transform tokens."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.ranking.mixers import ReversibleMixer
from recsys.ranking.part import Penalties, TokenNorm
from recsys.ranking.per_token import PerToken
from recsys.ranking.stacks.base import Block, Parts, Sequence

Residual = Literal["input", "stream"]


class MixRevertBlock(Block):
    """The block of TokenMixer-Large (arXiv 2602.06563, eqs. 12 and 16), with pre-norm as its §3.3.3 prescribes.

    ``input`` is the equations to the letter: the second residual comes from the block's input, and norm 1 runs over a mixed token::

        H' = mix(X) + F1(norm1(mix(X)))
        Y  = X + F2(norm2(revert(H')))

    ``stream`` is the order of the paper's figure 1: two sublayers on one residual stream, norm 1 over a token::

        R = X + revert(F1(mix(norm1(X))))
        Y = R + F2(norm2(R))

    ``revert(H') = X + revert(F1(·))``, so that the two differ in what norm 1 runs over and in whether F1's update stays in the stream.

    Args:
        mixer: T tokens of width D to H mixed tokens of width ``T * D / H``, and back.
        mixed: F1, on mixed tokens.
        token: F2, on tokens.
        residual: the reading of the equations.

    Raises:
        ConfigError: the parts do not fit together.
    """

    def __init__(self, mixer: ReversibleMixer, mixed: PerToken, token: PerToken, residual: Residual = "input") -> None:
        super().__init__()
        for what, part, expected in (
            ("mixed", mixed, (mixer.mixed_tokens, mixer.mixed_dim)),
            ("token", token, (mixer.tokens, mixer.dim)),
        ):
            if (part.tokens, part.dim) != expected:
                raise ConfigError(f"mix_revert: {what}: expected (tokens, dim) = {expected}, got {(part.tokens, part.dim)}")
        self.mixer, self.mixed, self.token, self.residual = mixer, mixed, token, residual
        self.norm1 = TokenNorm(mixer.mixed_dim if residual == "input" else mixer.dim)
        self.norm2 = TokenNorm(mixer.dim)

    def forward(self, x_btd: Tensor, penalties: Penalties = None) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        parts = self.mixer.parts(x_btd)
        if self.residual == "input":
            read_btd = self.mixer.join(self.mixed.residual(parts, parts, self.norm1, penalties))
            return self.token.residual(read_btd, x_btd, self.norm2, penalties)
        normed = self.mixer.parts(self.norm1(x_btd))
        read_btd = self.mixer.join(self.mixed.residual(normed, parts, penalties=penalties))
        return self.token.residual(read_btd, read_btd, self.norm2, penalties)


@register("stack", "mix_revert")
class MixRevert(Sequence):
    """Blocks of TokenMixer-Large: see `MixRevertBlock`. The mixer must be reversible.

    Raises:
        ConfigError: it is not.
    """

    class Config(BaseConfig):
        """How residuals run.

        Attributes:
            residual: the reading of eqs. 12 and 16.
            inter_residual: the gap of the inter-layer residual, in blocks; null for none.
            inter_mean: halve its sums, which a stack of more than about eight blocks needs: see `Sequence`.
        """

        name: Literal["mix_revert"] = "mix_revert"
        residual: Residual = "input"
        inter_residual: int | None = Field(2, ge=1)
        inter_mean: bool = False

    normalised: ClassVar[bool] = False

    def __init__(self, config: Config, parts: Parts, blocks: int) -> None:
        super().__init__((self._block(config, parts) for _ in range(blocks)), config.inter_residual, config.inter_mean)

    @staticmethod
    def _block(config: Config, parts: Parts) -> MixRevertBlock:
        mixer = parts.new_mixer()
        if not isinstance(mixer, ReversibleMixer):
            raise ConfigError(f"mix_revert: expected a mixer with an inverse, such as token_mix, got {type(mixer).__name__}")
        mixed = parts.new_per_token(mixer.mixed_tokens, mixer.mixed_dim)
        return MixRevertBlock(mixer, mixed, parts.new_per_token(), config.residual)
