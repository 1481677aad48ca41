# SPDX-License-Identifier: Apache-2.0
"""HiFormer (Google, arXiv 2311.05884)."""

from typing import Literal

from pydantic import Field

from recsys.core.components import component_config, register
from recsys.ranking.mixers import HiFormer
from recsys.ranking.per_token import FFN
from recsys.ranking.stacks import PostNorm
from recsys.ranking.token_ranker import TokenRanker
from recsys.ranking.tokenizers import FieldTokenizer


@register("ranker", "hiformer")
class HiFormerRanker(TokenRanker):
    """HiFormer (arXiv 2311.05884): `HiFormer` × `FFN` × `PostNorm`.

    As the paper has it: one token per field; attention whose queries, keys and values come from composite projections of low rank; an
    output projection and a feed-forward network for each token.

    Chosen where it differs or the paper is silent:

    - the logits come from the mean of all last tokens. The paper's output layer reads some tokens only, and its last layer is pruned to
      the queries of those; here every token is read, so that there is nothing to prune;
    - one rank for queries, keys and values, 64 by default; null gives the full projections;
    - LayerNorm after each residual sum; exact GELU.
    """

    class Config(TokenRanker.Config):
        """Defaults of the paper where it has them."""

        name: Literal["hiformer"] = "hiformer"  # type: ignore[assignment]
        tokenizer: component_config("tokenizer") = FieldTokenizer.Config()  # type: ignore[valid-type]
        dim: int = Field(64, ge=1)
        mixer: HiFormer.Config = HiFormer.Config(rank=64)
        per_token: component_config("per_token", optional=True) = FFN.Config()  # type: ignore[valid-type]
        stack: component_config("stack") = PostNorm.Config()  # type: ignore[valid-type]
