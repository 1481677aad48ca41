# SPDX-License-Identifier: Apache-2.0
"""UniMixer (Kuaishou, arXiv 2604.00590)."""

from typing import Literal

from pydantic import Field

from recsys.core.components import component_config, register
from recsys.ranking.mixers import UniMixing
from recsys.ranking.per_token import SwiGLU
from recsys.ranking.stacks import Siamese
from recsys.ranking.token_ranker import TokenRanker
from recsys.ranking.tokenizers import FieldTokenizer


@register("ranker", "unimixer")
class UniMixer(TokenRanker):
    """UniMixer (arXiv 2604.00590): `UniMixing` × `SwiGLU` × `Siamese`.

    As the paper has it: mixing by learned, symmetric, doubly stochastic matrices over blocks of the flattened tokens, at a temperature
    that falls linearly from 1.0 to 0.05 (§4.2-4.3); blocks ``RMSNorm(X + mix(X))``, then a per-token SwiGLU (§4.4); SiameseNorm over
    the blocks (§4.5). Its tokens are ``tokenizer: {name: auto_split, tokens: T}``; the default is a token per field, since no T fits
    all inputs.

    Warm-up in two stages, which the paper offers instead of annealing within one run, is a matter of two configurations:

    1. train with ``mixer.temperature: {start: 1.0, end: 1.0}``, a constant high temperature;
    2. build the model with ``mixer.temperature: {start: 0.05, end: 0.05}``, load the state dict of stage 1, and train on.

    The state dict carries the position of the schedule, which a constant temperature does not read. To let stage 2 anneal as well,
    call ``module.restart()`` on each `recsys.ranking.mixers.temperature.Temperature` of the model after loading.

    Chosen where the paper is silent:

    - B, the iterations, the scaling and the initial logits: see `UniMixing`;
    - the length of the annealing, ``mixer.temperature.anneal_steps``: set it to about the number of training steps;
    - SwiGLU: its expansion, no biases, and down matrices that start small;
    - the readout: mean over tokens, then task towers, as in RankMixer; SiameseNorm's output has left norms, so that none is added;
    - production sizes are not disclosed; the defaults are small. The paper's models have 2 or 4 blocks.
    """

    class Config(TokenRanker.Config):
        """Defaults of the paper, small."""

        name: Literal["unimixer"] = "unimixer"  # type: ignore[assignment]
        tokenizer: component_config("tokenizer") = FieldTokenizer.Config()  # type: ignore[valid-type]
        dim: int = Field(64, ge=1)
        blocks: int = Field(2, ge=1)
        mixer: UniMixing.Config = UniMixing.Config()
        per_token: component_config("per_token") = SwiGLU.Config()  # type: ignore[valid-type]
        stack: Siamese.Config = Siamese.Config()
