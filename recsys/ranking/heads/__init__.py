# SPDX-License-Identifier: Apache-2.0
"""Heads: from one vector to one logit per task; each in one file under its name."""

from recsys.ranking.heads.base import Head
from recsys.ranking.heads.mmoe import MMoE
from recsys.ranking.heads.shared_bottom import SharedBottom
from recsys.ranking.heads.towers import Towers

__all__ = ["Head", "MMoE", "SharedBottom", "Towers"]
