# SPDX-License-Identifier: Apache-2.0
"""History encoders: a jagged history and a candidate become one or more field vectors; each in one file under its name."""

from recsys.ranking.history.attention import TargetAttention
from recsys.ranking.history.base import Events, Histories, HistoryEncoder, Reads
from recsys.ranking.history.hstu import HSTU

__all__ = ["HSTU", "Events", "Histories", "HistoryEncoder", "Reads", "TargetAttention"]
