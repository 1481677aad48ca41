# SPDX-License-Identifier: Apache-2.0
"""Per-token transformations: every token has weights of its own; each in one file under its name."""

from recsys.ranking.per_token.base import PerToken, hidden_width, per_token_linear, xavier_uniform_per_token_
from recsys.ranking.per_token.ffn import FFN
from recsys.ranking.per_token.pattention import PerTokenPattention, grow
from recsys.ranking.per_token.quantized import quantize_mixtures
from recsys.ranking.per_token.relu_moe import ReluMoE
from recsys.ranking.per_token.sparse_moe import SparseMoE
from recsys.ranking.per_token.swiglu import SwiGLU

__all__ = [
    "FFN",
    "PerToken",
    "PerTokenPattention",
    "ReluMoE",
    "SparseMoE",
    "SwiGLU",
    "grow",
    "hidden_width",
    "per_token_linear",
    "quantize_mixtures",
    "xavier_uniform_per_token_",
]
