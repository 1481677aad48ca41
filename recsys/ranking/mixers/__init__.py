# SPDX-License-Identifier: Apache-2.0
"""Mixers: how information moves between tokens, each in one file under its name."""

from recsys.ranking.mixers.base import Mixer, ReversibleMixer
from recsys.ranking.mixers.identity import Identity
from recsys.ranking.mixers.token_mix import TokenMix, mix, revert

__all__ = ["Identity", "Mixer", "ReversibleMixer", "TokenMix", "mix", "revert"]
