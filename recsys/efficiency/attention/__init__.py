# SPDX-License-Identifier: Apache-2.0
"""Attention that reads a part of a long history. Importing this package registers the forms by name."""

from recsys.efficiency.attention.base import SparseAttention
from recsys.efficiency.attention.biformer import BiFormerAttention
from recsys.efficiency.attention.dhsa import DHSA
from recsys.efficiency.attention.fasa import FasaAttention
from recsys.efficiency.attention.hisa import DsaAttention, HisaAttention
from recsys.efficiency.attention.token_select import TokenSelectAttention
from recsys.efficiency.attention.token_sparse import TokenSparseAttention

__all__ = [
    "DHSA",
    "BiFormerAttention",
    "DsaAttention",
    "FasaAttention",
    "HisaAttention",
    "SparseAttention",
    "TokenSelectAttention",
    "TokenSparseAttention",
]
