# SPDX-License-Identifier: Apache-2.0
"""One figure within bounds, and one difference to the champion."""

from typing import Literal

from pydantic import FiniteFloat

from recsys.core.config import Config
from recsys.registry.evidence import Evidence
from recsys.registry.gates.result import GateResult, lookup, not_worse, within


class Bound(Config):
    """A number of the candidate's metrics, by its dotted path, within bounds.

    Attributes:
        metric: a path in the metrics, such as ``ranking.tokenmixer_large.auc`` or ``intervals.ranker_above_logistic.low``.
        at_least: the smallest value that passes.
        at_most: the largest value that passes.
    """

    kind: Literal["bound"] = "bound"
    metric: str
    at_least: FiniteFloat | None = None
    at_most: FiniteFloat | None = None

    def judge(self, evidence: Evidence) -> list[GateResult]:
        """One result."""
        value = lookup(evidence.metrics, self.metric)
        return [within(self.metric, value, self.at_least, self.at_most, absent="not among the metrics")]


class AgainstChampion(Config):
    """The candidate is not worse than the champion: the lower end of a paired interval over users is at least ``-margin``.

    Attributes:
        metric: a name in the comparison that the pipeline measured on the same test events, such as ``list.ndcg@10``.
        margin: how much worse than the champion is still accepted, in the metric's unit.
    """

    kind: Literal["against_champion"] = "against_champion"
    metric: str
    margin: FiniteFloat = 0.0

    def judge(self, evidence: Evidence) -> list[GateResult]:
        """One result; none while there is no champion."""
        if evidence.comparison is None:
            return []
        return [not_worse(f"champion:{self.metric}", evidence.comparison, self.metric, self.margin)]
