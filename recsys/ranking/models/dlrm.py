# SPDX-License-Identifier: Apache-2.0
"""DLRM (Meta, arXiv 1906.00091), and its successor with cross layers."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from recsys.core.components import register
from recsys.core.errors import ConfigError
from recsys.ranking.flat_ranker import Body, FlatRanker
from recsys.ranking.interactions import CrossNet, DotInteraction, HiddenLayers, Widths
from recsys.ranking.tokenizers import Fields, FieldTokenizer


@register("ranker", "dlrm")
class DLRM(FlatRanker):
    """DLRM (arXiv 1906.00091): dense columns through a bottom MLP, dot products of all vectors, a top MLP.

    As the paper has it: the bottom MLP makes one vector, as wide as an embedding, of all dense columns; it and the fields' vectors meet
    in the dot products of all pairs, without those of a vector with itself; these and the bottom MLP's output go to the top MLP. Every
    layer but the head has ReLU. ``structure: dcn`` is the model of MLPerf and of TorchRec (``DLRM_DCN``): all vectors, one after
    another, go through cross layers of low rank to the top MLP. With one task and the default head, both equal TorchRec's.

    Chosen where the paper is silent: a history and its candidate are fields like any other; without dense columns there is no bottom
    MLP; the vectors of a table that is narrower or wider than ``embedding.dim`` go through an affine map (`FieldTokenizer`). Default
    widths are those that the authors run on Criteo, for ``dot``; layers and rank are MLPerf's, for ``dcn``.

    Raises:
        ConfigError: there are too few fields, so that ``dot`` has nothing to pair.
    """

    class Config(FlatRanker.Config):
        """Sizes.

        Attributes:
            structure: how the vectors meet.
            bottom: widths of the bottom MLP's layers before the last, which is as wide as the embedding.
            top: widths of the top MLP's layers before the head.
            layers: of the cross network (``dcn`` alone).
            rank: of the cross layers' matrices; null for full ones (``dcn`` alone).
        """

        name: Literal["dlrm"] = "dlrm"
        structure: Literal["dot", "dcn"] = "dot"
        bottom: Widths = (512, 256)
        top: Widths = (512, 256)
        layers: int = Field(3, ge=1)
        rank: int | None = Field(512, ge=1)

    config: Config

    def new_body(self) -> Body:
        """Bottom, interaction, top."""
        return BottomAndTop(self.config, self.widths, self.spec.dense)


class BottomAndTop(Body):
    """``[B, W] → [B, width]``.

    Args:
        config: see `DLRM.Config`.
        widths: those of the fields, dense columns last.
        dense: the dense columns.
    """

    def __init__(self, config: DLRM.Config, widths: Mapping[str, int], dense: Sequence[str]) -> None:
        super().__init__()
        cross, dim = config.structure == "dcn", config.embedding.dim
        self.dim = dim
        vectors = {field: width for field, width in widths.items() if field not in dense}
        if len(vectors) < (least := 1 if dense or cross else 2):
            raise ConfigError(f"structure: {config.structure!r} expects {least} fields or more beside dense columns, got {len(vectors)}")
        self.tokenizer = FieldTokenizer(FieldTokenizer.Config(), Fields(vectors), dim)
        self.bottom = HiddenLayers(len(dense), (*config.bottom, dim)) if dense else None
        total = len(vectors) + bool(dense)
        self.interaction = CrossNet(total * dim, config.layers, config.rank) if cross else DotInteraction(total, dim)
        width = total * dim if cross else total * (total - 1) // 2 + dim * bool(dense)
        self.top = HiddenLayers(width, config.top)
        self.width = self.top.width

    @property
    def flops(self) -> int:
        """Those of the parts."""
        bottom = 0 if self.bottom is None else self.bottom.flops
        return self.tokenizer.flops + bottom + self.interaction.flops + self.top.flops

    def forward(self, x_bw: Tensor) -> Tensor:
        """The features."""
        width = sum(self.tokenizer.widths.values())
        vectors_bw, dense_bw = x_bw.split((width, x_bw.shape[1] - width), dim=1)
        e_bw = vectors_bw if self.tokenizer.flat else self.tokenizer(vectors_bw).flatten(1)
        bottom = [] if self.bottom is None else [self.bottom(dense_bw)]
        if bottom:
            e_bw = torch.cat([*bottom, e_bw], dim=1)
        if isinstance(self.interaction, CrossNet):
            met_bw = self.interaction(e_bw)
        else:
            met_bw = torch.cat([*bottom, self.interaction(e_bw.unflatten(1, (-1, self.dim)))], dim=1)
        features: Tensor = self.top(met_bw)
        return features
