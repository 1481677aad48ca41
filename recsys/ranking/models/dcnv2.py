# SPDX-License-Identifier: Apache-2.0
"""DCN V2 (Google, arXiv 2008.13535)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from recsys.core.components import register
from recsys.ranking.flat_ranker import Body, FlatRanker
from recsys.ranking.interactions import CrossNet, HiddenLayers, Widths


@register("ranker", "dcnv2")
class DCNv2(FlatRanker):
    """DCN V2 (arXiv 2008.13535): a cross network and a deep network over the flat vector.

    As the paper has it: cross layers of full or low rank (eqs. 1 and 2); the deep network reads the cross network's output
    (``stacked``) or the flat vector, and then both outputs are concatenated (``parallel``) (§3.4); the gated mixture of low-rank
    experts (eq. 3) is left out.

    Chosen where the paper is silent: the initialisation, see `Cross`; the place of batch norm, between linear map and activation. The
    sizes are tuned per data set; the default hidden widths are those that most papers on click-through rates share. The best known
    configuration for Criteo_x4 is 3 layers in parallel with 5 × 1000, batch norm and dropout 0.1 (BARS).
    """

    class Config(FlatRanker.Config):
        """Sizes.

        Attributes:
            structure: how cross and deep network are combined.
            layers: of the cross network.
            rank: of the cross layers' matrices; null for full ones.
            hidden: widths of the deep network; none leaves the cross network alone.
            batch_norm: whether the deep network has it.
            dropout: of the deep network.
        """

        name: Literal["dcnv2"] = "dcnv2"
        structure: Literal["parallel", "stacked"] = "parallel"
        layers: int = Field(3, ge=1)
        rank: int | None = Field(None, ge=1)
        hidden: Widths = (400, 400, 400)
        batch_norm: bool = False
        dropout: float = Field(0.0, ge=0, lt=1)

    config: Config

    def new_body(self) -> Body:
        """Cross and deep network."""
        return CrossAndDeep(self.config, sum(self.widths.values()))


class CrossAndDeep(Body):
    """``[B, W] → [B, width]``.

    Args:
        config: see `DCNv2.Config`.
        dim: W.
    """

    def __init__(self, config: DCNv2.Config, dim: int) -> None:
        super().__init__()
        self.cross = CrossNet(dim, config.layers, config.rank)
        self.deep = HiddenLayers(dim, config.hidden, batch_norm=config.batch_norm, dropout=config.dropout)
        self.parallel = config.structure == "parallel" and bool(config.hidden)
        self.width = self.deep.width + dim * self.parallel

    @property
    def flops(self) -> int:
        """Those of both networks."""
        return self.cross.flops + self.deep.flops

    def forward(self, x_bw: Tensor) -> Tensor:
        """The features."""
        crossed_bw = self.cross(x_bw)
        features: Tensor = torch.cat([crossed_bw, self.deep(x_bw)], dim=1) if self.parallel else self.deep(crossed_bw)
        return features
