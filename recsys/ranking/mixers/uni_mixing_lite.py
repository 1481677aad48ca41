# SPDX-License-Identifier: Apache-2.0
"""UniMixing-Lite (UniMixer, arXiv 2604.00590): UniMixing with shared bases and low-rank logits."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.ranking.mixers.uni_mixing import BlockMixing
from recsys.ranking.sinkhorn import full_precision


@register("mixer", "uni_mixing_lite")
class UniMixingLite(BlockMixing):
    """UniMixing-Lite (arXiv 2604.00590, §4.6): ``W_B^n = Σ_l ω[n, l] Z_l`` and ``W_G = A_G B_G``, with ``b B² + n b + 2 n r`` parameters.

    It saves parameters, not operations: the exponential of low-rank logits has full rank, so that the n × n matrix must be made. With
    b = n the local matrices, with r = n the global one is as free as in `UniMixing`; with one basis and r = 2 it still comes as near to
    any permutation as the scale of the logits allows.

    Chosen where the paper is silent: symmetric logits and the temperature as in UniMixing; ω without a softmax; b = 4, and r the smaller
    of n and 64; initial values such that the logits have the standard deviation ``init_std``, as in UniMixing. With
    ``permutation_gain`` the first basis starts as ``c I``, and ``A B`` as ``c G P Pᵀ`` with a random projection P of rank r: ``c G`` itself
    where r = n, else ``c G`` plus noise of c times about ``√(1 / r − 1 / n)``.

    Raises:
        ConfigError: as in `BlockMixing`.
    """

    class Config(BlockMixing.Config):
        """See `BlockMixing.Config`.

        Attributes:
            bases: b.
            rank: r; null for the smaller of n and 64.
        """

        name: Literal["uni_mixing_lite"] = "uni_mixing_lite"
        bases: int = Field(4, ge=1)
        rank: int | None = Field(None, ge=1)

    config: Config

    def __init__(self, config: Config, tokens: int, dim: int) -> None:
        super().__init__(config, tokens, dim)
        rank = min(self.blocks, 64) if config.rank is None else config.rank
        self.bases = nn.Parameter(torch.empty(config.bases, self.block, self.block))
        self.coefficients = nn.Parameter(torch.empty(self.blocks, config.bases))
        self.left = nn.Parameter(torch.empty(self.blocks, rank))
        self.right = nn.Parameter(torch.empty(rank, self.blocks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.normal_(self.bases, std=self.config.init_std)
        nn.init.normal_(self.coefficients, std=self.config.bases**-0.5)
        for factor in (self.left, self.right):
            nn.init.normal_(factor, std=(self.config.init_std / self.left.shape[1] ** 0.5) ** 0.5)
        if gain := self.config.permutation_gain:
            self._start_at_permutation(gain)

    @torch.no_grad()
    def _start_at_permutation(self, gain: float) -> None:
        n, rank = self.left.shape
        projection = torch.eye(n, rank) if rank >= n else nn.init.orthogonal_(torch.empty(n, rank), gain=(n / rank) ** 0.5)
        self.left.add_((self._permutation() @ projection).to(self.left), alpha=gain)
        self.right.add_(projection.T.to(self.right))
        self.bases[0].add_(torch.eye(self.block).to(self.bases), alpha=gain)
        self.coefficients[:, 0] = 1.0

    def weights(self) -> tuple[Tensor, Tensor]:
        """See `BlockMixing.weights`."""
        with torch.autocast(self.left.device.type, enabled=False):
            global_nn = full_precision(self.left) @ full_precision(self.right)
            local_nf = full_precision(self.coefficients) @ full_precision(self.bases).flatten(1)
        return global_nn, local_nf.unflatten(1, (self.block, self.block))
