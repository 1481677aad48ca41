# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a history or of a request go on. Importing this package registers the scorers and stop tests by name."""

from recsys.efficiency.pruning.adaptive_sparse import AdaptiveSparseEncoder, ClassAttention
from recsys.efficiency.pruning.cacovid import CaCoVIDScorer
from recsys.efficiency.pruning.core_matching import CoreMatching
from recsys.efficiency.pruning.idpruner import IDPruner
from recsys.efficiency.pruning.quota import QuotaAllocator, SessionQuota
from recsys.efficiency.pruning.todre import DiverseRetention, InformationMigration
from recsys.efficiency.pruning.transprune import TransPrune

__all__ = [
    "AdaptiveSparseEncoder",
    "CaCoVIDScorer",
    "ClassAttention",
    "CoreMatching",
    "DiverseRetention",
    "IDPruner",
    "InformationMigration",
    "QuotaAllocator",
    "SessionQuota",
    "TransPrune",
]
