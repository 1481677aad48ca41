# SPDX-License-Identifier: Apache-2.0
"""Recorded decisions computed again: by the bundle that made them, to hold that it computes the same; by another, to see how it differs.

The bundle of the record retrieves anew and must find the same candidates; another bundle gives its opinion of the candidates of the record,
since the features of others were not recorded.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from recsys.bundle.bundle import Bundle
from recsys.core.schema import ITEM, TIME
from recsys.decisions.decision import CANDIDATES, Decision, Evidence
from recsys.decisions.recorded import recorded_features
from recsys.inference import rules
from recsys.inference.frame import ITEM_SERVICE, USER_SERVICE
from recsys.inference.recommender import Ranked, Recommender
from recsys.inference.recorded import RecordedReader

OVERLAP_AT = 10
OPINIONS = tuple(name for name in CANDIDATES.names if name != ITEM)


@dataclass(frozen=True)
class ReplayReport:
    """What a replay found. A difference is that of two numbers; infinite where only one side has an item among its candidates.

    Attributes:
        bundle: the SHA-256 of the bundle that computed again.
        decisions: how many were computed again.
        own: how many of them this bundle had made.
        skipped: how many were not, by reason: ``not_recorded`` (no evidence), ``not_ranked`` (an answer without features or candidates, as
            one of a fallback), ``other_features`` (the bundle reads other versions of features than were recorded), ``no_common_item``.
        rows: candidates that were compared.
        unknown_items: candidates of the record that the bundle's catalogue does not hold; they are not compared.
        exact: decisions of which every number and the order are the same to the bit.
        reordered: decisions of which the list differs.
        largest: by ``log_probability``, ``probability`` and ``score``: the greatest difference.
        overlap: the mean over decisions of the share of the first ten items that both lists have; None without decisions.
        score_drift: the mean over candidates of the new score less that of the record; None without rows.
        score_shift: the mean over candidates of the absolute value of that.
        worst: the request id with the greatest difference; None where there is none.
    """

    bundle: str
    decisions: int
    own: int
    skipped: Mapping[str, int]
    rows: int
    unknown_items: int
    exact: int
    reordered: int
    largest: Mapping[str, float]
    overlap: float | None
    score_drift: float | None
    score_shift: float | None
    worst: str | None

    @property
    def largest_difference(self) -> float:
        """The greatest difference of any number."""
        return max(self.largest.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values; an infinite difference is the text ``infinity``, which JSON has no number for."""
        largest = {name: value if np.isfinite(value) else "infinity" for name, value in self.largest.items()}
        return asdict(self) | {"largest": largest}


@dataclass(frozen=True)
class _Compared:
    """One decision and its replay: ``recorded`` and ``replayed`` hold float32 ``[C]`` by opinion; a list is of catalogue rows."""

    decision: Decision
    recorded: Mapping[str, np.ndarray]
    replayed: Mapping[str, np.ndarray]
    unknown_items: int
    missing: int
    lists: tuple[np.ndarray, np.ndarray]

    def difference(self, name: str) -> float:
        """The greatest of one opinion; two infinite or undefined values differ unless they are the same bits."""
        if self.missing:
            return np.inf
        one, other = self.recorded[name], self.replayed[name]
        same = one.view(np.uint32) == other.view(np.uint32)
        with np.errstate(invalid="ignore"):
            apart = np.where(same, 0.0, np.abs(one.astype(np.float64) - other.astype(np.float64)))
        return float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max(initial=0.0))

    @property
    def exact(self) -> bool:
        """Whether all numbers and the list are the same to the bit."""
        same = all(np.array_equal(self.recorded[name].view(np.uint32), self.replayed[name].view(np.uint32)) for name in OPINIONS)
        return same and not self.missing and not self.reordered

    @property
    def reordered(self) -> bool:
        """Whether the lists differ."""
        return not np.array_equal(*self.lists)

    @property
    def overlap(self) -> float:
        """The share of the first `OVERLAP_AT` that both lists have."""
        one, other = (set(each[:OVERLAP_AT].tolist()) for each in self.lists)
        return len(one & other) / max(len(one), len(other), 1)


def replay(bundle: Bundle, decisions: Iterable[Decision]) -> ReplayReport:
    """Compute recorded decisions again with a bundle, one after another, from the features of the record.

    With the bundle of the record, on the same kind of machine, a decision that was computed alone comes out to the bit. One that was
    computed in a batch with others may differ by rounding, since matrix products of other sizes add up in another order.

    Args:
        bundle: the models.
        decisions: of one log or of several; those without evidence are counted and skipped.
    """
    reader = RecordedReader()
    recommender = Recommender(bundle, reader)
    skipped: Counter[str] = Counter()
    return _report(bundle.manifest.sha256, _replayed(recommender, reader, decisions, skipped), skipped)


def _replayed(
    recommender: Recommender, reader: RecordedReader, decisions: Iterable[Decision], skipped: Counter[str]
) -> Iterator[_Compared]:
    for decision in decisions:
        evidence, reason = decision.evidence, _reason(recommender, decision)
        if reason is not None or evidence is None:
            skipped[reason or "not_recorded"] += 1
            continue
        reader.show(recorded_features(decision, recommender.bundle.settings.seen_feature))
        yield _compare(recommender, decision, evidence)


def _reason(recommender: Recommender, decision: Decision) -> str | None:
    """Why a decision cannot be computed again, if so."""
    evidence, versions = decision.evidence, recommender.bundle.manifest.feature_versions
    if evidence is None:
        return "not_recorded"
    if evidence.user is None or evidence.items is None or not evidence.candidates.num_rows:
        return "not_ranked"
    if any(decision.feature_versions.get(service) != versions.get(service) for service in (USER_SERVICE, ITEM_SERVICE)):
        return "other_features"
    return None if (recommender.view.rows(evidence.candidates.column(ITEM)) >= 0).any() else "no_common_item"


def _compare(recommender: Recommender, decision: Decision, evidence: Evidence) -> _Compared:
    rows = recommender.view.rows(evidence.candidates.column(ITEM))
    known = rows >= 0
    ranked = _ranked(recommender, decision, evidence, rows[known])
    place_of = {row: place for place, row in enumerate(ranked.candidates.rows[0].tolist()) if row >= 0}
    places = np.array([place_of.get(row, -1) for row in rows[known].tolist()], np.int64)
    found = {"log_probability": ranked.candidates.log_probability[0], "probability": ranked.probability[0], "score": ranked.score[0]}
    recorded = {name: np.asarray(evidence.candidates.column(name))[known] for name in OPINIONS}
    replayed = {name: np.where(places >= 0, found[name][places], np.nan).astype(np.float32) for name in OPINIONS}
    listed = ranked.candidates.rows[0][rules.top(ranked.score[0], ranked.candidates.rows[0], decision.k)]
    return _Compared(
        decision=decision,
        recorded=recorded,
        replayed=replayed,
        unknown_items=int((~known).sum()),
        missing=int((places < 0).sum()) + len(place_of.keys() - set(rows[known].tolist())),
        lists=(_recorded_list(recommender, decision, recorded["score"], rows[known]), listed),
    )


def _ranked(recommender: Recommender, decision: Decision, evidence: Evidence, rows: np.ndarray) -> Ranked:
    """The bundle's own way to its candidates where the record is its own, else its opinion of those of the record."""
    users = recommender.users([decision.user_id], pa.array([decision.time], TIME))
    if decision.bundle == recommender.bundle.manifest.sha256 and evidence.seen is not None:
        return recommender.rank(users, recommender.retrieve(users, evidence.wanted))
    return recommender.rank(users, recommender.score(users, rows[None]))


def _recorded_list(recommender: Recommender, decision: Decision, score: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The list of the record by scores: what was shown, where that was the only list which could have been."""
    if np.all(np.asarray(decision.shown.column("propensity")) == 1):
        shown = recommender.view.rows(decision.shown.column(ITEM))
        return shown[shown >= 0]
    best: np.ndarray = rows[rules.top(score, rows, decision.k)]
    return best


def _report(bundle: str, compared: Iterable[_Compared], skipped: Mapping[str, int]) -> ReplayReport:
    """The sums over all; ``skipped`` is complete once ``compared`` has been gone through."""
    largest = dict.fromkeys(OPINIONS, 0.0)
    count, worst, most = Counter[str](), None, 0.0
    drift, shift, overlap = 0.0, 0.0, 0.0
    for one in compared:
        apart = {name: one.difference(name) for name in OPINIONS}
        largest = {name: max(largest[name], apart[name]) for name in OPINIONS}
        if max(apart.values()) > most:
            worst, most = one.decision.request_id, max(apart.values())
        moved = one.replayed["score"].astype(np.float64) - one.recorded["score"].astype(np.float64)
        moved = moved[np.isfinite(moved)]
        count.update(
            decisions=1,
            own=int(one.decision.bundle == bundle),
            rows=len(one.recorded["score"]),
            moved=len(moved),
            unknown_items=one.unknown_items,
            exact=int(one.exact),
            reordered=int(one.reordered),
        )
        drift, shift, overlap = drift + float(moved.sum()), shift + float(np.abs(moved).sum()), overlap + one.overlap
    return ReplayReport(
        bundle=bundle,
        decisions=count["decisions"],
        own=count["own"],
        skipped=dict(sorted(skipped.items())),
        rows=count["rows"],
        unknown_items=count["unknown_items"],
        exact=count["exact"],
        reordered=count["reordered"],
        largest=largest,
        overlap=overlap / count["decisions"] if count["decisions"] else None,
        score_drift=drift / count["moved"] if count["moved"] else None,
        score_shift=shift / count["moved"] if count["moved"] else None,
        worst=worst,
    )
