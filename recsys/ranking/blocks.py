# SPDX-License-Identifier: Apache-2.0
"""Block styles: how a mixer, per-token transformations, norms and residuals make one block; and the stack of blocks.

Tensors are ``[B, T, D]`` by shape. Inside a block they lie tokens-outermost in memory, so that the one copy in each mix and revert is
the only transposition.
"""

from collections.abc import Iterable
from typing import Literal

from torch import Tensor, nn

from recsys.core.errors import ConfigError
from recsys.ranking.experts import PerToken
from recsys.ranking.mixers import ReversibleMixer

NORM_EPS = 1e-6  # undisclosed by the papers; public re-implementations use 1e-6 to 1e-8

Residual = Literal["input", "stream"]


class TokenNorm(nn.RMSNorm):
    """RMSNorm over the width of each token, one gain per channel shared by the tokens; writes tokens-outermost.

    ``nn.RMSNorm`` alone would write batch-outermost, whatever lay in memory before.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=NORM_EPS)

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        return super().forward(x_btd.transpose(0, 1)).transpose(0, 1)


class MixRevert(nn.Module):
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

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, T, D]``."""
        if self.residual == "input":
            mixed_bhd = self.mixer(x_btd)
            read_btd, kept_btd = self.mixer.revert(mixed_bhd + self.mixed(self.norm1(mixed_bhd))), x_btd
        else:
            read_btd = kept_btd = x_btd + self.mixer.revert(self.mixed(self.mixer(self.norm1(x_btd))))
        update_btd: Tensor = self.token(self.norm2(read_btd))
        return kept_btd + update_btd


class BlockStack(nn.Module):
    """Blocks one after another, with TokenMixer-Large's inter-layer residual.

    X(0) is the input and X(l) the output of block l of L. With gap s, ``X(l) ← X(l) + X(l − s)`` for l = s, 2s, … < L, before the next
    block reads it. The last block's output gets none (the paper). The indexing is ours: X(l − s) is the value that went on from
    there, sum included, so that identity blocks give ``2 ** (number of sums) * X(0)``.

    Args:
        blocks: modules ``[B, T, D] → [B, T, D]``.
        gap: s, or None for no inter-layer residual.

    Raises:
        ConfigError: ``gap`` is below 1.
    """

    def __init__(self, blocks: Iterable[nn.Module], gap: int | None = None) -> None:
        super().__init__()
        if gap is not None and gap < 1:
            raise ConfigError(f"inter_residual: expected a gap of at least 1 block, or null, got {gap}")
        self.blocks = nn.ModuleList(blocks)
        self.gap = gap

    def forward(self, x_btd: Tensor) -> list[Tensor]:
        """X(1), …, X(L), each ``[B, T, D]`` with its inter-layer residual."""
        states = [x_btd]
        for number, block in enumerate(self.blocks, start=1):
            state = block(states[-1])
            if self.gap is not None and number % self.gap == 0 and number < len(self.blocks):
                state = state + states[number - self.gap]
            states.append(state)
        return states[1:]
