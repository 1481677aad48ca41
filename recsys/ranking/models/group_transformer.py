# SPDX-License-Identifier: Apache-2.0
"""The Group Transformer with which TokenMixer-Large is compared (ByteDance, arXiv 2602.06563)."""

from typing import Literal

from pydantic import Field

from recsys.core.components import component_config, register
from recsys.ranking.mixers import HeteroAttention
from recsys.ranking.per_token import FFN
from recsys.ranking.stacks import PreNorm
from recsys.ranking.token_ranker import TokenRanker
from recsys.ranking.tokenizers import GroupTokenizer


@register("ranker", "group_transformer")
class GroupTransformer(TokenRanker):
    """Group Transformer, a baseline of TokenMixer-Large (arXiv 2602.06563): `HeteroAttention` × `FFN` × `PreNorm`.

    As the paper has it: attention over the tokens of semantic groups, with a query, key, value and output projection for each token.

    Chosen where the paper is silent, which is nearly everywhere:

    - the tokenizer is TokenMixer-Large's, so that the two differ in their blocks alone;
    - a feed-forward network for each token, with GELU and expansion 4;
    - RMSNorm before each sublayer, a final norm, and the mean over tokens;
    - sizes and heads. The defaults are small.
    """

    class Config(TokenRanker.Config):
        """The choices above."""

        name: Literal["group_transformer"] = "group_transformer"  # type: ignore[assignment]
        tokenizer: GroupTokenizer.Config = GroupTokenizer.Config()
        dim: int = Field(256, ge=1)
        blocks: int = Field(4, ge=1)
        mixer: HeteroAttention.Config = HeteroAttention.Config()
        per_token: component_config("per_token", optional=True) = FFN.Config()  # type: ignore[valid-type]
        stack: component_config("stack") = PreNorm.Config()  # type: ignore[valid-type]
