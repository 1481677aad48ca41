# SPDX-License-Identifier: Apache-2.0
"""TokenMixer-Large (ByteDance, arXiv 2602.06563)."""

from typing import Literal

from pydantic import Field

from recsys.core.components import component_config, register
from recsys.ranking.mixers import TokenMix
from recsys.ranking.per_token import SwiGLU
from recsys.ranking.stacks import MixRevert
from recsys.ranking.token_ranker import TokenRanker
from recsys.ranking.tokenizers import GroupTokenizer


@register("ranker", "tokenmixer_large")
class TokenMixerLarge(TokenRanker):
    """TokenMixer-Large (arXiv 2602.06563): `TokenMix` × `SwiGLU` × `MixRevert`.

    As the paper has it: a token per semantic group of fields and a global token over the raw fields of all (eqs. 1-4); blocks that
    mix, transform mixed tokens, revert, transform tokens (eqs. 12 and 16-18), pre-RMSNorm, down matrices of 0.01 × Xavier; an
    inter-layer residual every 2-3 blocks, not into the last; auxiliary losses on lower blocks; mean over tokens, then task towers.

    Chosen where the paper is silent or ambiguous:

    - the block's residuals: see `MixRevertBlock`; the default takes the equations literally;
    - biases, and uniform or normal Xavier: see `SwiGLU`. One expansion n serves both transformations of a block;
    - the tokenizer's MLPs: see `GroupTokenizer`. Every field belongs to exactly one group. A pooled history and the candidate that it
      is compared with are fields like any other;
    - the indexing of the inter-layer residual: see `recsys.ranking.stacks.Sequence`;
    - auxiliary losses: see `TokenRanker.Config`. ``residual`` is the reading of low layers that "estimate the deviation of high-level
      features". λ is not disclosed;
    - a final norm before the mean, since the stream of a pre-norm stack is not normalised;
    - dropout, on the tokens and on the towers' hidden layers. The paper mentions none, and by default there is none;
    - production sizes are not disclosed; the defaults are small.
    """

    class Config(TokenRanker.Config):
        """Defaults of the paper. Fewer heads make F1 larger: it has ``3 n T² D² / H`` weights."""

        name: Literal["tokenmixer_large"] = "tokenmixer_large"  # type: ignore[assignment]
        tokenizer: GroupTokenizer.Config = GroupTokenizer.Config()
        dim: int = Field(512, ge=1)
        blocks: int = Field(4, ge=1)
        mixer: TokenMix.Config = TokenMix.Config()
        per_token: component_config("per_token") = SwiGLU.Config()  # type: ignore[valid-type]
        stack: MixRevert.Config = MixRevert.Config()
        auxiliary: Literal["deep_supervision", "residual"] | None = "deep_supervision"
