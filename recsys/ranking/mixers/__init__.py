# SPDX-License-Identifier: Apache-2.0
"""Mixers: how information moves between tokens, each in one file under its name."""

from recsys.ranking.mixers.attention import HeteroAttention, HiFormer, SelfAttention
from recsys.ranking.mixers.base import Mixer, ReversibleMixer
from recsys.ranking.mixers.ensemble import Cross, Dot, Ensemble, Linear
from recsys.ranking.mixers.factorization import FactorizationMachine
from recsys.ranking.mixers.identity import Identity
from recsys.ranking.mixers.token_mix import TokenMix, mix, revert
from recsys.ranking.mixers.uni_mixing import UniMixing, fold_mixing
from recsys.ranking.mixers.uni_mixing_lite import UniMixingLite

__all__ = [
    "Cross",
    "Dot",
    "Ensemble",
    "FactorizationMachine",
    "HeteroAttention",
    "HiFormer",
    "Identity",
    "Linear",
    "Mixer",
    "ReversibleMixer",
    "SelfAttention",
    "TokenMix",
    "UniMixing",
    "UniMixingLite",
    "fold_mixing",
    "mix",
    "revert",
]
