# SPDX-License-Identifier: Apache-2.0
"""Wukong (Meta, arXiv 2403.02545)."""

from typing import Literal

from pydantic import Field

from recsys.core.components import component_config, register
from recsys.ranking.heads import Towers
from recsys.ranking.mixers import FactorizationMachine
from recsys.ranking.stacks import PostNorm
from recsys.ranking.token_ranker import TokenRanker
from recsys.ranking.tokenizers import FieldTokenizer


@register("ranker", "wukong")
class Wukong(TokenRanker):
    """Wukong (arXiv 2403.02545): `FactorizationMachine` × nothing per token × `PostNorm`.

    As the paper has it: one token per field; layers ``X ← LayerNorm(concat(FMB(X), LCB(X)) + X)``, each of which doubles the highest
    order of interaction, so that L layers reach ``2^L``; the last tokens one after another, then an MLP.

    Chosen where the paper is silent or open:

    - n_F + n_L = T in every layer, so that the residual needs no linear map: see `FactorizationMachine`. The paper tunes n_F and n_L;
    - LayerNorm over the width of each token;
    - sizes: those of FuxiCTR's implementation for k, the block's MLP and L, one hidden layer of 256 in the final MLP;
    - one final MLP for each task.
    """

    class Config(TokenRanker.Config):
        """Defaults of the paper; ``dim`` equals the embeddings' by default, so that their vectors are the tokens."""

        name: Literal["wukong"] = "wukong"  # type: ignore[assignment]
        tokenizer: component_config("tokenizer") = FieldTokenizer.Config()  # type: ignore[valid-type]
        dim: int = Field(32, ge=1)
        blocks: int = Field(3, ge=1)
        mixer: FactorizationMachine.Config = FactorizationMachine.Config()
        per_token: component_config("per_token", optional=True) = None  # type: ignore[valid-type]
        stack: PostNorm.Config = PostNorm.Config()
        readout: Literal["mean", "flatten"] = "flatten"
        head: component_config("head") = Towers.Config(hidden=(256,))  # type: ignore[valid-type]
