# SPDX-License-Identifier: Apache-2.0
"""One token for each field."""

from typing import Literal

import torch
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.ranking.part import linear_flops, split_fields
from recsys.ranking.tokenizers.base import Fields, Tokenizer


@register("tokenizer", "fields")
class FieldTokenizer(Tokenizer):
    """Token i is field i: what AutoInt, Wukong, DHEN, DLRM and HiFormer call a feature embedding. T = fields.

    A field whose vector is D wide is taken as it is; any other goes through an affine map of its own. So a dense column x becomes
    ``x · v + b``, which is AutoInt's embedding of numerical fields (arXiv 1810.11921, §4.2) with a bias.

    Attributes:
        flat: whether the tokens are the fields' vectors themselves, so that ``[B, W]`` is ``[B, T, D]`` as it stands.
    """

    class Config(BaseConfig):
        """Nothing to choose."""

        name: Literal["fields"] = "fields"

    def __init__(self, config: Config, fields: Fields, dim: int) -> None:
        super().__init__(fields, dim)
        self.projections = nn.ModuleList(nn.Identity() if width == dim else nn.Linear(width, dim) for width in self.widths.values())
        self.tokens = len(self.projections)
        self.flat = all(width == dim for width in self.widths.values())

    @property
    def flops(self) -> int:
        """Those of the affine maps."""
        return linear_flops(self)

    def forward(self, x_bw: Tensor) -> Tensor:
        """See `Tokenizer.forward`."""
        if self.flat:
            return x_bw.view(-1, self.tokens, self.dim).transpose(0, 1).contiguous().transpose(0, 1)
        fields = split_fields(x_bw, self.widths).values()
        return torch.stack([projection(field) for projection, field in zip(self.projections, fields, strict=True)]).transpose(0, 1)
