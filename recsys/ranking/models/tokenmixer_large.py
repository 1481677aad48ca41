# SPDX-License-Identifier: Apache-2.0
"""TokenMixer-Large (ByteDance, arXiv 2602.06563)."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec
from recsys.ranking.blocks import BlockStack, MixRevert, Residual
from recsys.ranking.experts import SwiGLU
from recsys.ranking.heads import MeanReadout, masked_bce
from recsys.ranking.mixers import TokenMix
from recsys.ranking.model import Ranker
from recsys.ranking.tokenize import GroupTokenizer


@register("ranker", "tokenmixer_large")
class TokenMixerLarge(Ranker):
    """TokenMixer-Large with dense per-token SwiGLU (arXiv 2602.06563).

    As the paper has it: a token per semantic group of fields and a global token over the raw fields of all (eqs. 1-4); blocks that
    mix, transform mixed tokens, revert, transform tokens (eqs. 12 and 16-18), pre-RMSNorm, down matrices of 0.01 × Xavier; an
    inter-layer residual every 2-3 blocks, not into the last; auxiliary losses on lower blocks; mean over tokens, then task towers.

    Chosen where the paper is silent or ambiguous:

    - the block's residuals: see `MixRevert`; the default takes the equations literally;
    - biases, and uniform or normal Xavier: see `SwiGLU`. One expansion n serves both transformations of a block;
    - the tokenizer's MLPs: see `GroupTokenizer`. Every field belongs to exactly one group. A pooled history and the candidate that it
      is compared with are fields like any other;
    - the indexing of the inter-layer residual: see `BlockStack`;
    - auxiliary losses: every block but the last has a readout of its own (norm, mean, towers), used in training alone. The joint loss
      is ``BCE(y, z) + λ Σ BCE(y, z_l)`` (``deep_supervision``), or, for low layers that "estimate the deviation of high-level
      features", ``BCE(y, z) + λ Σ BCE(y, z_l + stop_gradient(z))`` (``residual``). λ is not disclosed;
    - a final norm before the mean, since the stream of a pre-norm stack is not normalised;
    - dropout, on the tokens and on the towers' hidden layers. The paper mentions none, and by default there is none;
    - production sizes are not disclosed; the defaults are small.

    Raises:
        ConfigError: heads that do not divide dim, or groups that are not a partition of the inputs' fields.
    """

    class Config(Ranker.Config):
        """Sizes and choices.

        Attributes:
            groups: the fields of each token, by the token's name.
            dim: D, the width of a token.
            blocks: L.
            heads: H, a divisor of D; by default as many as tokens. Fewer heads make F1 larger: it has ``3 n T² D² / H`` weights.
            expansion: n, the hidden width of SwiGLU over that of its token.
            residual: the reading of eqs. 12 and 16.
            inter_residual: the gap of the inter-layer residual, in blocks; null for none.
            auxiliary: the auxiliary loss; null for none.
            auxiliary_weight: λ.
            tokenizer_hidden: the hidden width of the tokenizer's MLPs; null for affine maps.
            head_hidden: the hidden widths of the task towers, the auxiliary ones too.
            dropout: on the tokens and in the towers.
        """

        name: Literal["tokenmixer_large"] = "tokenmixer_large"
        groups: dict[str, tuple[str, ...]]
        dim: int = Field(512, ge=1)
        blocks: int = Field(4, ge=1)
        heads: int | None = None
        expansion: float = Field(2.0, gt=0)
        residual: Residual = "input"
        inter_residual: int | None = Field(2, ge=1)
        auxiliary: Literal["deep_supervision", "residual"] | None = "deep_supervision"
        auxiliary_weight: float = Field(0.1, ge=0)
        tokenizer_hidden: int | None = Field(None, ge=1)
        head_hidden: tuple[int, ...] = ()
        dropout: float = Field(0.0, ge=0, lt=1)

    config: Config

    def __init__(self, config: Config, spec: InputSpec) -> None:
        super().__init__(config, spec)
        self.tokenizer = GroupTokenizer(config.groups, self.widths, config.dim, config.tokenizer_hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = BlockStack((self._block(self.tokenizer.tokens) for _ in range(config.blocks)), config.inter_residual)
        self.readout = self._readout()
        # Last, so that a seed gives the same model with and without them.
        self.auxiliary = nn.ModuleList(self._readout() for _ in range(config.blocks - 1) if config.auxiliary)

    def _block(self, tokens: int) -> MixRevert:
        config = self.config
        mixer = TokenMix(TokenMix.Config(heads=config.heads), tokens, config.dim)
        swiglu = SwiGLU.Config(expansion=config.expansion)
        mixed, token = SwiGLU(swiglu, mixer.mixed_tokens, mixer.mixed_dim), SwiGLU(swiglu, tokens, config.dim)
        return MixRevert(mixer, mixed, token, config.residual)

    def _readout(self) -> MeanReadout:
        return MeanReadout(self.config.dim, len(self.spec.tasks), self.config.head_hidden, self.config.dropout)

    def states(self, fields: Mapping[str, Tensor]) -> list[Tensor]:
        """The output of every block, ``[B, T, D]`` each."""
        states: list[Tensor] = self.stack(self.dropout(self.tokenizer(fields)))
        return states

    def interact(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[B, tasks]``; the auxiliary towers take no part."""
        logits: Tensor = self.readout(self.states(fields)[-1])
        return logits

    def loss(self, batch: RankingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Ranker.loss`. The part ``auxiliary`` is the sum of the auxiliary towers' losses, before λ."""
        labels = self.labels(batch)
        *lower, top = self.states(self.fields(self.embed(batch), batch))
        logits = self.readout(top)
        bce = masked_bce(logits, labels)
        if not self.auxiliary:
            return bce, {"bce": bce.detach()}
        base = logits.detach() if self.config.auxiliary == "residual" else torch.zeros_like(logits)
        towers = zip(self.auxiliary, lower, strict=True)
        auxiliary = torch.stack([masked_bce(base + tower(state), labels) for tower, state in towers]).sum()
        total = bce + self.config.auxiliary_weight * auxiliary
        return total, {"bce": bce.detach(), "auxiliary": auxiliary.detach()}
