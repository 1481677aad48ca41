# SPDX-License-Identifier: Apache-2.0
"""What all rankers over tokens share: tokenizer, stack of blocks, readout, auxiliary losses."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core import components
from recsys.core.components import component_config, register
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec
from recsys.ranking.heads import Towers
from recsys.ranking.losses import masked_bce
from recsys.ranking.mixers import TokenMix
from recsys.ranking.model import Ranker
from recsys.ranking.part import Penalties, outermost_parts
from recsys.ranking.per_token import SwiGLU
from recsys.ranking.readout import FlattenReadout, MeanReadout, Readout
from recsys.ranking.stacks import MixRevert, Parts, Stack
from recsys.ranking.tokenizers import Fields, FieldTokenizer, Tokenizer


@register("ranker", "token_ranker")
class TokenRanker(Ranker):
    """Tokenizer → blocks of mixer × per-token transformation in a block style → mean or concatenation of the tokens → head.

    Every published model of this form is a subclass that names its choices; this one leaves them open, and by default makes those of
    TokenMixer-Large over one token for each field.

    Raises:
        ConfigError: the parts do not fit together; the error names the key.
    """

    class Config(Ranker.Config):
        """Sizes and choices.

        Attributes:
            tokenizer: from fields to tokens.
            dim: D, the width of a token.
            blocks: L.
            mixer: how tokens exchange information.
            per_token: what each token goes through by itself; null for nothing, where the stack allows it.
            stack: how mixer, per-token transformation, norms and residuals make a block.
            readout: what the head reads: the mean of the last tokens, or their concatenation.
            head: from that vector to the logits.
            auxiliary: a loss on the states below the last; null for none. Every block but the last gets a readout of its own, used in
                training alone. The joint loss is ``BCE(y, z) + λ Σ BCE(y, z_l)`` (``deep_supervision``), or
                ``BCE(y, z) + λ Σ BCE(y, z_l + stop_gradient(z))`` (``residual``).
            auxiliary_weight: λ.
            dropout: on the tokens.
        """

        name: Literal["token_ranker"] = "token_ranker"
        tokenizer: component_config("tokenizer") = FieldTokenizer.Config()  # type: ignore[valid-type]
        dim: int = Field(64, ge=1)
        blocks: int = Field(2, ge=1)
        mixer: component_config("mixer") = TokenMix.Config()  # type: ignore[valid-type]
        per_token: component_config("per_token", optional=True) = SwiGLU.Config()  # type: ignore[valid-type]
        stack: component_config("stack") = MixRevert.Config()  # type: ignore[valid-type]
        readout: Literal["mean", "flatten"] = "mean"
        head: component_config("head") = Towers.Config()  # type: ignore[valid-type]
        auxiliary: Literal["deep_supervision", "residual"] | None = None
        auxiliary_weight: float = Field(0.1, ge=0)
        dropout: float = Field(0.0, ge=0, lt=1)

    config: Config

    def __init__(self, config: Config, spec: InputSpec) -> None:
        super().__init__(config, spec)
        self.tokenizer: Tokenizer = components.build("tokenizer", config.tokenizer, Fields(self.widths, self.groups), config.dim)
        self.dropout = nn.Dropout(config.dropout)
        parts = Parts(self.tokenizer.tokens, config.dim, config.mixer, config.per_token)
        self.stack: Stack = components.build("stack", config.stack, parts, config.blocks)
        self.readout = self._readout()
        # Last, so that a seed gives the same model with and without them.
        self.auxiliary = nn.ModuleList(self._readout() for _ in range(config.blocks - 1) if config.auxiliary)

    def _readout(self) -> Readout:
        config, tasks, norm = self.config, len(self.spec.tasks), not self.stack.normalised
        if config.readout == "flatten":
            return FlattenReadout(self.tokenizer.tokens, config.dim, tasks, config.head, norm)
        return MeanReadout(config.dim, tasks, config.head, norm)

    @property
    def flops(self) -> int:
        """Those of tokenizer, blocks and readout; the auxiliary readouts take no part."""
        return self.tokenizer.flops + sum(part.flops for part in outermost_parts(self.stack)) + self.readout.flops

    def states(self, x_bw: Tensor, penalties: Penalties = None) -> list[Tensor]:
        """The output of every block, ``[B, T, D]`` each."""
        states: list[Tensor] = self.stack(self.dropout(self.tokenizer(x_bw)), penalties)
        return states

    def interact(self, x_bw: Tensor) -> Tensor:
        """Logits ``[B, tasks]``; the auxiliary towers take no part."""
        logits: Tensor = self.readout(self.states(x_bw)[-1])
        return logits

    def loss(self, batch: RankingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Ranker.loss`. ``auxiliary`` is the sum of the auxiliary losses before λ, ``penalty`` that of the parts' penalties."""
        labels, embedded, penalties = self.labels(batch), self.embed(batch), list[Tensor]()
        *lower, top = self.states(self.fields(embedded, batch), penalties)
        logits = self.readout(top)
        total = bce = masked_bce(logits, labels, batch.weights)
        parts = {"bce": bce}
        if self.auxiliary:
            base = logits.detach() if self.config.auxiliary == "residual" else torch.zeros_like(logits)
            towers = zip(self.auxiliary, lower, strict=True)
            losses = [masked_bce(base + tower(state), labels, batch.weights) for tower, state in towers]
            parts["auxiliary"] = torch.stack(losses).sum()
            total = total + self.config.auxiliary_weight * parts["auxiliary"]
        if penalties:
            parts["penalty"] = torch.stack(penalties).sum()
            total = total + parts["penalty"]
        return self.with_l2(total, {name: part.detach() for name, part in parts.items()}, embedded)
