# SPDX-License-Identifier: Apache-2.0
"""AutoInt and AutoInt+ (arXiv 1810.11921)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core import components
from recsys.core.components import component_config, register
from recsys.data.spec import InputSpec
from recsys.ranking.mixers.attention import attend, attend_flops
from recsys.ranking.mlp import mlp
from recsys.ranking.model import Ranker
from recsys.ranking.part import TokenPart, linear_flops
from recsys.ranking.tokenizers import Fields, FieldTokenizer, Tokenizer


class InteractingLayer(TokenPart):
    """``relu(concat over heads of softmax(Q Kᵀ) V + W_res x)``: ``[B, T, D] → [B, T, H d]`` (arXiv 1810.11921, eqs. 5-8).

    The projections are shared by the tokens and have no bias, so that permuting the tokens permutes the result.

    Args:
        tokens: T.
        dim: D.
        heads: H.
        head_dim: d.
        scaled: whether the inner products are divided by ``sqrt(d)``; the paper does not.
    """

    def __init__(self, tokens: int, dim: int, heads: int, head_dim: int, scaled: bool) -> None:
        super().__init__(tokens, dim)
        self.heads, self.width, self.scale = heads, heads * head_dim, None if scaled else 1.0
        self.query, self.key, self.value, self.residual = (nn.Linear(dim, self.width, bias=False) for _ in range(4))

    def forward(self, x_btd: Tensor) -> Tensor:
        """``[B, T, D] → [B, T, H d]``, tokens-outermost in memory."""
        x_tbd = x_btd.transpose(0, 1)
        query, key, value, residual = (layer(x_tbd).transpose(0, 1) for layer in (self.query, self.key, self.value, self.residual))
        return torch.relu(attend(query, key, value, self.heads, self.scale) + residual)

    @property
    def flops(self) -> int:
        """``8 T D H d + 4 T² H d``."""
        return self.tokens * linear_flops(self) + attend_flops(self.tokens, self.width)


@register("ranker", "autoint")
class AutoInt(Ranker):
    """AutoInt+ (arXiv 1810.11921); with ``deep_hidden: []`` plain AutoInt.

    As the paper has it: one token per field; L interacting layers; the last tokens one after another, then an affine map to the logit;
    to this AutoInt+ adds the logit of an MLP on the first tokens.

    Chosen where it differs or the paper is silent:

    - a dense column gets an affine embedding, and pooled multi-valued fields are sums: see `FieldTokenizer` and the tables' ``pooling``;
    - the tasks share the layers and the MLP up to its last hidden layer;
    - dropout on the tokens and on the MLP's hidden layers, none by default;
    - the width of the tokens is that of the tables by default, 32, where the paper has 16.
    """

    class Config(Ranker.Config):
        """Sizes; the defaults of ``layers``, ``heads``, ``head_dim`` and ``deep_hidden`` are the paper's.

        Attributes:
            tokenizer: from fields to tokens.
            dim: D, the width of the first tokens.
            layers: L.
            heads: H.
            head_dim: d, the width of one head; the layers' tokens are ``H d`` wide.
            scaled: whether attention's inner products are divided by ``sqrt(d)``.
            deep_hidden: widths of the MLP's hidden layers; without any there is no MLP.
            dropout: on the tokens and on the MLP's hidden layers.
        """

        name: Literal["autoint"] = "autoint"
        tokenizer: component_config("tokenizer") = FieldTokenizer.Config()  # type: ignore[valid-type]
        dim: int = Field(32, ge=1)
        layers: int = Field(3, ge=1)
        heads: int = Field(2, ge=1)
        head_dim: int = Field(32, ge=1)
        scaled: bool = False
        deep_hidden: tuple[int, ...] = (400, 400)
        dropout: float = Field(0.0, ge=0, lt=1)

    config: Config

    def __init__(self, config: Config, spec: InputSpec) -> None:
        super().__init__(config, spec)
        self.tokenizer: Tokenizer = components.build("tokenizer", config.tokenizer, Fields(self.widths, self.groups), config.dim)
        self.dropout = nn.Dropout(config.dropout)
        tokens, width = self.tokenizer.tokens, config.heads * config.head_dim
        dims = (config.dim, *[width] * (config.layers - 1))
        self.layers = nn.Sequential(*(InteractingLayer(tokens, dim, config.heads, config.head_dim, config.scaled) for dim in dims))
        self.out = nn.Linear(tokens * width, len(spec.tasks))
        deep = (tokens * config.dim, *config.deep_hidden, len(spec.tasks))
        self.deep = mlp(deep, activation=nn.ReLU, dropout=config.dropout) if config.deep_hidden else None

    @property
    def flops(self) -> int:
        """Those of tokenizer, interacting layers, output map and MLP."""
        layers = sum(layer.flops for layer in self.layers if isinstance(layer, InteractingLayer))
        deep = 0 if self.deep is None else linear_flops(self.deep)
        return self.tokenizer.flops + layers + 2 * self.out.in_features * self.out.out_features + deep

    def interact(self, x_bw: Tensor) -> Tensor:
        """Logits ``[B, tasks]``."""
        tokens_btd = self.dropout(self.tokenizer(x_bw))
        logits: Tensor = self.out(self.layers(tokens_btd).flatten(1))
        return logits if self.deep is None else logits + self.deep(tokens_btd.flatten(1))
