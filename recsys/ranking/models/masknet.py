# SPDX-License-Identifier: Apache-2.0
"""MaskNet (Sina Weibo, arXiv 2102.07619)."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.ranking.flat_ranker import Body, FlatRanker
from recsys.ranking.interactions import FieldNorm, HiddenLayers, MaskBlock, Widths
from recsys.ranking.part import Part
from recsys.ranking.tokenizers import Fields, FieldTokenizer


@register("ranker", "masknet")
class MaskNet(FlatRanker):
    """MaskNet (arXiv 2102.07619): hidden layers that are multiplied by masks, which an MLP computes from the embeddings.

    As the paper has it: a dense column becomes a vector as wide as an embedding (eq. 3); each field's vector is normalised by itself
    (eq. 9); blocks and masks are those of `MaskBlock`; ``serial`` blocks read the output of the block before, and the last one's goes to
    the head; ``parallel`` blocks all read the normalised embeddings, and their outputs, concatenated, go through ReLU layers to the head
    (eqs. 15 and 16). The reduction ratio of 2 and widths of 400 are those of the experiments.

    Chosen where the paper is silent, or against it: a dense column's vector has a bias (see `FieldTokenizer`), since after the norm of
    ``V x`` alone only the sign of x would be left; the vectors of a table that is narrower or wider than ``embedding.dim`` go through an
    affine map as well; the parallel blocks share one normalisation of the embeddings. The paper varies the number of blocks from 1 to
    9; the default is the 3 of its study of masks.
    """

    class Config(FlatRanker.Config):
        """Sizes.

        Attributes:
            structure: how the blocks are arranged.
            blocks: how many.
            width: of every block's output.
            reduction: how many times as wide as the mask its hidden layer is.
            hidden: widths of the layers between blocks and head (``parallel`` alone).
            dropout: of those layers.
        """

        name: Literal["masknet"] = "masknet"
        structure: Literal["serial", "parallel"] = "serial"
        blocks: int = Field(3, ge=1)
        width: int = Field(400, ge=1)
        reduction: float = Field(2.0, gt=0)
        hidden: Widths = (400, 400, 400)
        dropout: float = Field(0.0, ge=0, lt=1)

    config: Config

    def new_body(self) -> Body:
        """Embeddings, norm, blocks, hidden layers."""
        return MaskBlocks(self.config, self.widths)


class MaskBlocks(Body):
    """``[B, W] → [B, width]``.

    Args:
        config: see `MaskNet.Config`.
        widths: those of the fields.
    """

    def __init__(self, config: MaskNet.Config, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.serial = config.structure == "serial"
        self.tokenizer = FieldTokenizer(FieldTokenizer.Config(), Fields(widths), config.embedding.dim)
        self.norm = FieldNorm(len(widths), config.embedding.dim)
        context = len(widths) * config.embedding.dim
        dims = [context] * config.blocks
        if self.serial:
            dims[1:] = [config.width] * (config.blocks - 1)
        self.blocks = nn.ModuleList(MaskBlock(context, dim, config.width, config.reduction) for dim in dims)
        merged = config.width if self.serial else config.blocks * config.width
        self.deep = HiddenLayers(merged, () if self.serial else config.hidden, dropout=config.dropout)
        self.width = self.deep.width

    @property
    def flops(self) -> int:
        """Those of dense columns' vectors, blocks and hidden layers."""
        return self.tokenizer.flops + sum(block.flops for block in self.blocks if isinstance(block, Part)) + self.deep.flops

    def forward(self, x_bw: Tensor) -> Tensor:
        """The features."""
        e_bfd = self.tokenizer(x_bw)
        v_bc, h_bd = e_bfd.flatten(1), self.norm(e_bfd).flatten(1)
        if self.serial:
            for block in self.blocks:
                h_bd = block(v_bc, h_bd)
        else:
            h_bd = torch.cat([block(v_bc, h_bd) for block in self.blocks], dim=1)
        features: Tensor = self.deep(h_bd)
        return features
