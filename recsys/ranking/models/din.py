# SPDX-License-Identifier: Apache-2.0
"""Deep Interest Network (Alibaba, arXiv 1706.06978)."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.ranking.flat_ranker import Body, FlatRanker
from recsys.ranking.history import TargetAttention
from recsys.ranking.interactions import HiddenLayers, Widths


@register("ranker", "din")
class DIN(FlatRanker):
    """DIN (arXiv 1706.06978): histories pooled as seen from the candidate, and an MLP over the flat vector.

    As the paper has it: an activation unit weighs each event by the candidate, without a softmax, and the weighted events are summed
    (eq. 3 and `recsys.ranking.history.attention.ActivationUnit`); bags are summed (``embedding.pooling``); all vectors go through an MLP
    with PReLU, 200 and 80 wide, to the output layer (fig. 2).

    Chosen where the paper is silent, or against it: PReLU and not Dice, whose statistics would make a row's result depend on its batch;
    the activation unit reads difference and product of candidate and event, where the figure has their outer product; its widths are
    those of the authors' code, 80 and 40. Several histories are pooled each by itself. There is no mini-batch aware regularisation.
    """

    class Config(FlatRanker.Config):
        """Sizes.

        Attributes:
            history: the activation unit.
            hidden: widths of the MLP.
            batch_norm: whether it has one.
            dropout: of the MLP.
        """

        name: Literal["din"] = "din"
        history: TargetAttention.Config = TargetAttention.Config()
        hidden: Widths = (200, 80)
        batch_norm: bool = False
        dropout: float = Field(0.0, ge=0, lt=1)

    config: Config

    def new_body(self) -> Body:
        """The MLP."""
        return Deep(self.config, sum(self.widths.values()))


class Deep(Body):
    """``[B, W] → [B, width]``.

    Args:
        config: see `DIN.Config`.
        dim: W.
    """

    def __init__(self, config: DIN.Config, dim: int) -> None:
        super().__init__()
        self.layers = HiddenLayers(dim, config.hidden, activation=nn.PReLU, batch_norm=config.batch_norm, dropout=config.dropout)
        self.width = self.layers.width

    @property
    def flops(self) -> int:
        """Those of the linear layers."""
        return self.layers.flops

    def forward(self, x_bw: Tensor) -> Tensor:
        """The features."""
        features: Tensor = self.layers(x_bw)
        return features
