# SPDX-License-Identifier: Apache-2.0
"""What all rankers over the flat vector of fields share: a body, a head."""

from abc import abstractmethod

from torch import Tensor

from recsys.core import components
from recsys.core.components import component_config
from recsys.data.spec import InputSpec
from recsys.ranking.heads import Head, Towers
from recsys.ranking.model import Ranker
from recsys.ranking.part import Part


class Body(Part):
    """``[B, W] → [B, width]``: what a model makes of the fields' vectors, one after another in the order of `Ranker.widths`.

    Attributes:
        width: of the result, set by the subclass.
    """

    width: int

    @abstractmethod
    def forward(self, x_bw: Tensor) -> Tensor:
        """The features that the head reads."""


class FlatRanker(Ranker):
    """Fields' vectors, one after another ``[B, W]`` → body → head. A model says what its body is."""

    class Config(Ranker.Config):
        """``head``: from the body's features to the logits; by default the plain output layer."""

        head: component_config("head") = Towers.Config()  # type: ignore[valid-type]

    config: Config

    def __init__(self, config: Config, spec: InputSpec) -> None:
        super().__init__(config, spec)
        self.body = self.new_body()
        self.head = self.new_head()

    @abstractmethod
    def new_body(self) -> Body:
        """The body, built from ``config``, ``spec`` and `widths`."""

    def new_head(self) -> Part:
        """From the body's features to the logits."""
        head: Head = components.build("head", self.config.head, self.body.width, len(self.spec.tasks))
        return head

    @property
    def flops(self) -> int:
        """Those of body and head."""
        return self.body.flops + self.head.flops

    def interact(self, x_bw: Tensor) -> Tensor:
        """Logits ``[B, tasks]``."""
        logits: Tensor = self.head(self.body(x_bw))
        return logits
