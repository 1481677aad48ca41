# SPDX-License-Identifier: Apache-2.0
"""RankMixer (ByteDance, arXiv 2507.15551)."""

from typing import Literal

from pydantic import Field

from recsys.core.components import component_config, register
from recsys.ranking.mixers import TokenMix
from recsys.ranking.per_token import FFN
from recsys.ranking.stacks import PostNorm
from recsys.ranking.token_ranker import TokenRanker
from recsys.ranking.tokenizers import FieldTokenizer


@register("ranker", "rankmixer")
class RankMixer(TokenRanker):
    """RankMixer (arXiv 2507.15551): `TokenMix` × `FFN` × `PostNorm`.

    As the paper has it: mixing without parameters, with as many heads as tokens, so that the residual around it has a shape; a
    feed-forward network with GELU for each token; LayerNorm after each of the two residual sums; mean over tokens, then task towers. The
    paper's sparse variant is ``per_token: {name: relu_moe}``, with experts routed by ReLU: see `ReluMoE`. Its tokens are ``tokenizer:
    {name: auto_split, tokens: T}`` over fields in semantic order; the default is a token per field, since no T fits all inputs.

    The default sizes are those of the paper's model of 100M parameters (D = 768 and two blocks; it has 16 tokens). T must divide D.

    Chosen where the paper is silent:

    - the expansion of the feed-forward networks: see `FFN`. No single integer gives the paper's counts of parameters;
    - there is neither an inter-layer residual nor an auxiliary loss: both came with TokenMixer-Large;
    - the readout has no norm of its own, since the last block ends with one.

    Raises:
        ConfigError: as many heads as tokens do not divide ``dim``, or ``mixer.heads`` is another number.
    """

    class Config(TokenRanker.Config):
        """Defaults of the paper."""

        name: Literal["rankmixer"] = "rankmixer"  # type: ignore[assignment]
        tokenizer: component_config("tokenizer") = FieldTokenizer.Config()  # type: ignore[valid-type]
        dim: int = Field(768, ge=1)
        blocks: int = Field(2, ge=1)
        mixer: TokenMix.Config = TokenMix.Config()
        per_token: component_config("per_token") = FFN.Config()  # type: ignore[valid-type]
        stack: PostNorm.Config = PostNorm.Config()
