# SPDX-License-Identifier: Apache-2.0
"""Tokens from equal cuts of all fields' vectors."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.ranking.tokenizers.base import Fields, Tokenizer


@register("tokenizer", "auto_split")
class AutoSplitTokenizer(Tokenizer):
    """The tokenizer of RankMixer (arXiv 2507.15551), which UniMixer takes over.

    All field vectors are concatenated in the order of the fields to one vector of F numbers, which is cut into T chunks of equal width
    ``d_in = ceil(F / T)``; token i is ``W_i chunk_i + b_i``. A chunk may begin and end within a field: semantic order is what keeps
    related fields in one token, and `PermutedTokenizer` is what takes that order away.

    Chosen where the paper is silent: the last chunk is filled up with zeros, each map starts as ``nn.Linear`` of its width does, and T
    for which a whole chunk would be filling is an error.

    Raises:
        ConfigError: a token would read no field.
    """

    class Config(BaseConfig):
        """How many tokens.

        Attributes:
            tokens: T.
        """

        name: Literal["auto_split"] = "auto_split"
        tokens: int = Field(ge=1)

    def __init__(self, config: Config, fields: Fields, dim: int) -> None:
        super().__init__(fields, dim)
        self.tokens = config.tokens
        inputs = sum(fields.widths.values())
        self.chunk = math.ceil(inputs / self.tokens)
        if (self.tokens - 1) * self.chunk >= inputs:
            fitting = math.ceil(inputs / self.chunk) if inputs else 0
            raise ConfigError(
                f"tokens: {self.tokens} chunks of {self.chunk} leave the last token without one of the {inputs} numbers of all fields; "
                f"expected another count, such as {fitting}"
            )
        self.padding = self.tokens * self.chunk - inputs
        bound = 1 / math.sqrt(self.chunk)
        self.weight = nn.Parameter(torch.empty(self.tokens, self.chunk, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(self.tokens, 1, dim).uniform_(-bound, bound))

    @property
    def flops(self) -> int:
        """``2 T d_in D``; the zeros that fill up the last chunk are multiplied too."""
        return 2 * self.tokens * self.chunk * self.dim

    @property
    def idle(self) -> int:
        """The weights that only ever meet filling."""
        return self.padding * self.dim

    def forward(self, x_bw: Tensor) -> Tensor:
        """See `Tokenizer.forward`."""
        filled_bw = functional.pad(x_bw, (0, self.padding)) if self.padding else x_bw
        chunks_tbi = filled_bw.unflatten(1, (self.tokens, self.chunk)).transpose(0, 1)
        return torch.baddbmm(self.bias, chunks_tbi, self.weight).transpose(0, 1)
