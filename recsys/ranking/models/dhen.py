# SPDX-License-Identifier: Apache-2.0
"""DHEN (Meta, arXiv 2203.11014)."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from recsys.core.components import component_config, register
from recsys.ranking.heads import Towers
from recsys.ranking.mixers import Ensemble
from recsys.ranking.stacks import PostNorm
from recsys.ranking.token_ranker import TokenRanker
from recsys.ranking.tokenizers import FieldTokenizer


@register("ranker", "dhen")
class DHEN(TokenRanker):
    """Deep hierarchical ensemble network (arXiv 2203.11014): `Ensemble` × nothing per token × `PostNorm`.

    As the paper has it: one token per field; layers ``X ← Norm(Ensemble(interactions of X) + ShortCut(X))``, where the ensemble is a sum
    or a concatenation of several kinds of interaction.

    Chosen where it differs or the paper is silent:

    - every layer gives T tokens, so that the shortcut is the identity: see `Ensemble`;
    - all layers have the same members, by default inner products, self-attention, the cross layer and a linear map over tokens. Any
      other mixer that keeps the shape may join them. The paper's convolution is left out;
    - self-attention without the feed-forward network of a transformer's encoder;
    - LayerNorm over the width of each token; the last tokens one after another, then an MLP for each task;
    - sizes, and the rank of the cross layer.
    """

    # With vector instructions the CPU kernel of its layers' backward pass writes beyond memory and ends the process (PyTorch 2.13, see
    # pytorch/pytorch#181618). Without them it is right.
    compile_options: ClassVar[Mapping[str, str | int | bool]] = {"cpp.simdlen": 1}

    class Config(TokenRanker.Config):
        """``mixer.interactions`` names the members; ``dim`` equals the embeddings' by default, so that their vectors are the tokens."""

        name: Literal["dhen"] = "dhen"  # type: ignore[assignment]
        tokenizer: component_config("tokenizer") = FieldTokenizer.Config()  # type: ignore[valid-type]
        dim: int = Field(32, ge=1)
        blocks: int = Field(3, ge=1)
        mixer: Ensemble.Config = Ensemble.Config()
        per_token: component_config("per_token", optional=True) = None  # type: ignore[valid-type]
        stack: component_config("stack") = PostNorm.Config()  # type: ignore[valid-type]
        readout: Literal["mean", "flatten"] = "flatten"
        head: component_config("head") = Towers.Config(hidden=(256,))  # type: ignore[valid-type]
