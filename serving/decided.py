# SPDX-License-Identifier: Apache-2.0
"""From what the engine answers to the decision log."""

from recsys.decisions.decision import RequestKind, decision_of, evidence_of
from recsys.decisions.log import DecisionLog
from serving.engine import Served
from serving.metrics import Metrics


class Decided:
    """Writes every answer down; told by the engine, on a thread of its own.

    Args:
        log: takes the decisions.
    """

    def __init__(self, log: DecisionLog) -> None:
        self.log = log
        self._metrics: Metrics | None = None
        self._dropped = 0

    def start(self, metrics: Metrics) -> None:
        """Count in these metrics what the log drops."""
        self._metrics = metrics

    def __call__(self, served: Served) -> None:
        """Offer one answer's decision; with its evidence, if it was ranked and the log keeps it."""
        recommender, evidence = served.loaded.recommender, None
        kind: RequestKind = "rank" if served.given else "recommend"
        # A replay computes a list by its scores alone, which rules that choose among items do not follow.
        by_score = not served.request.rules.over(recommender.bundle.settings.rules).choose
        if served.users is not None and served.ranked is not None and by_score and self.log.keeps_evidence(served.request_id):
            evidence = evidence_of(recommender, served.users, served.ranked, 0, kind=kind)
        decision = decision_of(
            recommender,
            served.request,
            served.response,
            evidence,
            request_id=served.request_id,
            kind=kind,
            version=served.loaded.version,
        )
        self.log.offer(decision)
        self._count()

    def close(self) -> None:
        """Write what waits."""
        self.log.close()
        self._count()

    def _count(self) -> None:
        """What could not be written is known later than it was offered: with the next answer."""
        dropped = self.log.dropped
        if self._metrics is not None:
            self._metrics.dropped_decisions.inc(dropped - self._dropped)
        self._dropped = dropped
