# SPDX-License-Identifier: Apache-2.0
"""The published rankers, each in one file under its name."""

from recsys.ranking.models.autoint import AutoInt
from recsys.ranking.models.dcnv2 import DCNv2
from recsys.ranking.models.dhen import DHEN
from recsys.ranking.models.din import DIN
from recsys.ranking.models.dlrm import DLRM
from recsys.ranking.models.finalmlp import FinalMLP
from recsys.ranking.models.group_transformer import GroupTransformer
from recsys.ranking.models.hiformer import HiFormerRanker
from recsys.ranking.models.masknet import MaskNet
from recsys.ranking.models.rankmixer import RankMixer
from recsys.ranking.models.tokenmixer_large import TokenMixerLarge
from recsys.ranking.models.unimixer import UniMixer
from recsys.ranking.models.unimixing_lite import UniMixingLiteRanker
from recsys.ranking.models.wukong import Wukong

__all__ = [
    "DHEN",
    "DIN",
    "DLRM",
    "AutoInt",
    "DCNv2",
    "FinalMLP",
    "GroupTransformer",
    "HiFormerRanker",
    "MaskNet",
    "RankMixer",
    "TokenMixerLarge",
    "UniMixer",
    "UniMixingLiteRanker",
    "Wukong",
]
