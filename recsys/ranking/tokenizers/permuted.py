# SPDX-License-Identifier: Apache-2.0
"""Tokens from groups of fields that were drawn by lot."""

import hashlib
from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

from pydantic import Field
from torch import Tensor

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.ranking.tokenizers.base import Fields, Tokenizer
from recsys.ranking.tokenizers.groups import GroupTokenizer


@register("tokenizer", "permuted")
class PermutedTokenizer(Tokenizer):
    """The randomised permutation split of RankUp (arXiv 2604.17878): the fields are shuffled once, by seed, then grouped and projected.

    Whole fields are shuffled, never parts of their vectors. The order decides what a token means, so it must be the same wherever a
    trained model is loaded, which library generators do not promise across versions: fields stand in the order of the SHA-256 of
    ``seed:field``. It does not depend on the order of the fields either, and a new field leaves the others' order as it is.

    Chosen where the paper is silent: groups are contiguous in the shuffled order and differ by at most one in their number of fields, the
    larger ones first; projections and global token are those of `GroupTokenizer`. RankUp's cross and task tokens are not part of it.

    Raises:
        ConfigError: there are more groups than fields, or no group at all.
    """

    class Config(BaseConfig):
        """How many tokens, and which permutation.

        Attributes:
            tokens: T, the global token included.
            seed: of the permutation.
            hidden: the width of a hidden layer in each projection; null for affine maps.
            global_token: whether token 0 reads all fields.
        """

        name: Literal["permuted"] = "permuted"
        tokens: int = Field(ge=1)
        seed: int = 0
        hidden: int | None = Field(None, ge=1)
        global_token: bool = True

    def __init__(self, config: Config, fields: Fields, dim: int) -> None:
        super().__init__(fields, dim)
        widths = fields.widths
        groups = config.tokens - config.global_token
        if not 1 <= groups <= len(widths):
            expected = f"{1 + config.global_token} to {len(widths) + config.global_token} for {len(widths)} fields"
            raise ConfigError(f"tokens: expected {expected}{' and a global token' if config.global_token else ''}, got {config.tokens}")
        self.order = shuffled(widths, config.seed)
        parts = {str(i): tuple(self.order[start:stop]) for i, (start, stop) in enumerate(_cuts(len(self.order), groups))}
        inner = GroupTokenizer.Config(groups=parts, hidden=config.hidden, global_token=config.global_token)
        self.inner = GroupTokenizer(inner, fields, dim)
        self.tokens = self.inner.tokens

    @property
    def flops(self) -> int:
        """Those of the projections."""
        return self.inner.flops

    def forward(self, x_bw: Tensor) -> Tensor:
        """See `Tokenizer.forward`."""
        tokens_btd: Tensor = self.inner(x_bw)
        return tokens_btd


def shuffled(fields: Iterable[str], seed: int) -> list[str]:
    """The fields in an order drawn by seed: the same on every machine and under every version of every library."""
    return sorted(fields, key=lambda field: hashlib.sha256(f"{seed}:{field}".encode()).digest())


def _cuts(count: int, parts: int) -> list[tuple[int, int]]:
    """The bounds of ``parts`` contiguous parts of ``count`` things, the first ``count % parts`` of them one larger."""
    small, larger = divmod(count, parts)
    bounds = [i * small + min(i, larger) for i in range(parts + 1)]
    return list(pairwise(bounds))
