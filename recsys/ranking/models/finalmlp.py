# SPDX-License-Identifier: Apache-2.0
"""FinalMLP (Huawei, arXiv 2304.00902)."""

from collections.abc import Mapping
from itertools import accumulate
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError, unknown
from recsys.ranking.flat_ranker import Body, FlatRanker
from recsys.ranking.interactions import BilinearFusion, HiddenLayers, Widths
from recsys.ranking.mlp import mlp
from recsys.ranking.part import Part, linear_flops


class Stream(Part):
    """A feature gate, then hidden layers: ``[B, W] → [B, width]``.

    The gate is ``x ⊙ 2σ(MLP(context))`` where the context is some of the fields, such as the user's. Without context there is nothing
    for an MLP to read, and the gate is ``x ⊙ 2σ(g)`` with learned g, zero at first.

    Args:
        config: see `Config`.
        widths: those of the fields.
        name: for errors.

    Raises:
        ConfigError: a field of the context is unknown.
    """

    class Config(BaseConfig):
        """One stream.

        Attributes:
            hidden: widths of its layers.
            batch_norm: whether they have it.
            dropout: of those layers.
            context: the fields that the gate reads; none for a gate that is the same for all rows; null for no gate.
            gate_hidden: widths of the gate's hidden layers, where it has a context.
        """

        hidden: Widths = (400, 400, 400)
        batch_norm: bool = False
        dropout: float = Field(0.0, ge=0, lt=1)
        context: tuple[str, ...] | None = ()
        gate_hidden: Widths = (64,)

    def __init__(self, config: Config, widths: Mapping[str, int], name: str) -> None:
        super().__init__()
        for field in config.context or ():
            if field not in widths:
                raise ConfigError(f"{name}.context: {unknown('field', field, widths)}")
        ends = dict(zip(widths, accumulate(widths.values()), strict=True))
        self.columns = [slice(ends[field] - widths[field], ends[field]) for field in config.context or ()]
        dim, context = sum(widths.values()), sum(widths[field] for field in config.context or ())
        self.gate = mlp((context, *config.gate_hidden, dim), activation=nn.ReLU) if config.context else None
        self.gain = nn.Parameter(torch.zeros(dim)) if config.context == () else None
        self.deep = HiddenLayers(dim, config.hidden, batch_norm=config.batch_norm, dropout=config.dropout)
        self.width = self.deep.width

    @property
    def flops(self) -> int:
        """Those of the linear layers."""
        return linear_flops(self)

    def gated(self, x_bw: Tensor) -> Tensor:
        """``[B, W] → [B, W]``: the vector that the hidden layers read."""
        if self.gate is not None:
            return x_bw * (2 * torch.sigmoid(self.gate(torch.cat([x_bw[:, columns] for columns in self.columns], dim=1))))
        return x_bw if self.gain is None else x_bw * (2 * torch.sigmoid(self.gain))

    def forward(self, x_bw: Tensor) -> Tensor:
        """The last layer's activations."""
        h_bw: Tensor = self.deep(self.gated(x_bw))
        return h_bw


@register("ranker", "finalmlp")
class FinalMLP(FlatRanker):
    """FinalMLP (arXiv 2304.00902): two MLPs over the flat vector, each behind a gate of its own, and their bilinear fusion.

    As the paper has it: gates ``2σ(Gate_i(x_i))`` on each coordinate, conditioned on nothing, on the user's or on the item's fields;
    multi-head bilinear fusion into the logit.

    Chosen where the paper is silent, or against it: a gate without a context is a learned vector (see `Stream`), where the authors' code
    puts a learned input through the gate's MLP, which can say no more; with several tasks, each has a fusion of its own, which is why
    there is no other head. Widths and heads are tuned per data set; the defaults are ours.

    Raises:
        ConfigError: a field of a context is unknown; ``heads`` does not divide the streams' widths.
    """

    class Config(FlatRanker.Config):
        """Sizes.

        Attributes:
            first: one stream.
            second: the other.
            heads: of the fusion.
            head: null; the fusion gives the logits.
        """

        name: Literal["finalmlp"] = "finalmlp"
        first: Stream.Config = Stream.Config()
        second: Stream.Config = Stream.Config()
        heads: int = Field(1, ge=1)
        head: None = None

    config: Config

    def new_body(self) -> Body:
        """The two streams."""
        return Streams(self.config, self.widths)

    def new_head(self) -> Part:
        """The fusion."""
        assert isinstance(self.body, Streams)
        return BilinearFusion(self.body.first.width, self.body.second.width, self.config.heads, len(self.spec.tasks))


class Streams(Body):
    """Two streams, their results one after the other: ``[B, W] → [B, P + Q]``.

    Args:
        config: see `FinalMLP.Config`.
        widths: those of the fields.
    """

    def __init__(self, config: FinalMLP.Config, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.first, self.second = Stream(config.first, widths, "first"), Stream(config.second, widths, "second")
        self.width = self.first.width + self.second.width

    @property
    def flops(self) -> int:
        """Those of both."""
        return self.first.flops + self.second.flops

    def forward(self, x_bw: Tensor) -> Tensor:
        """The features."""
        return torch.cat([self.first(x_bw), self.second(x_bw)], dim=1)
