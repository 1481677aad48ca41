# SPDX-License-Identifier: Apache-2.0
"""What gates want measured on the machine of the promotion: only the caller has features to answer requests with."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from recsys.bundle.bundle import Bundle
from recsys.inference.features import FeatureReader
from recsys.inference.recommender import Recommender
from recsys.inference.request import Request
from recsys.registry.gates import Gate, LatencyBudget, ParityBound
from recsys.registry.gates.parity import of_decisions, of_golden
from recsys.registry.gates.served import LATENCY, PARITY

_WARM_UP = 5  # requests that are not counted: the first ones pay for what is built once


class Replayed(Protocol):
    """What a replay of recorded decisions found."""

    @property
    def largest_difference(self) -> float:
        """The largest absolute difference between a recorded number and the same one computed again; infinite where one is absent."""
        ...

    @property
    def rows(self) -> int:
        """How many scores were compared."""
        ...


Replay = Callable[[Bundle], Replayed]
"""Scores recorded decisions again with a bundle, from the features that were recorded with them. The decisions must be the bundle's own."""


def measure(
    gates: Sequence[Gate],
    directory: Path,
    reader: FeatureReader,
    users: Sequence[str],
    decisions: Replay | None = None,
    *,
    at: datetime | None = None,
) -> dict[str, Any]:
    """What `Evidence.measured` is to hold for some gates; nothing is loaded or asked where no gate wants it.

    Args:
        gates: what must hold.
        directory: the candidate.
        reader: features as they would be served.
        users: who is asked for, in turn, by the latency gates. None are no measurement, which fails them.
        decisions: computes the candidate's recorded decisions again, for the parity gates. Where it compares nothing, or is not given,
            the requests that the bundle was recorded with are answered again.
        at: the time of the requests; now by default.

    Raises:
        BundleError: the candidate is incomplete or was changed.
    """
    budgets = [gate for gate in gates if isinstance(gate, LatencyBudget)]
    compares = any(isinstance(gate, ParityBound) for gate in gates)
    if not budgets and not compares:
        return {}
    bundle, measured = Bundle.load(directory), dict[str, Any]()
    if budgets and users:
        k, count = max(gate.k for gate in budgets), max(gate.requests for gate in budgets)
        measured[LATENCY] = latency(Recommender(bundle, reader), users, count, k, at or datetime.now(UTC))
    if compares and (found := parity(bundle, decisions)) is not None:
        measured[PARITY] = found
    return measured


def parity(bundle: Bundle, decisions: Replay | None = None) -> dict[str, Any] | None:
    """What the parity gates are to read of a bundle: see `measure`; None where there is nothing to compare.

    Args:
        bundle: the candidate.
        decisions: see `measure`.
    """
    report = None if decisions is None else decisions(bundle)
    if report is not None and report.rows:
        return of_decisions(report.largest_difference, report.rows)
    return of_golden(bundle)


def latency(recommender: Recommender, users: Sequence[str], count: int, k: int, at: datetime) -> dict[str, float | int]:
    """Median and 99th percentile, in milliseconds, of ``count`` recommendations, one at a time, in this process.

    Args:
        recommender: the candidate.
        users: who is asked for, in turn.
        count: how many are measured, after a few that are not.
        k: items of a list.
        at: the time of the requests.
    """
    requests = [Request(user_id=users[place % len(users)], k=k, at=at) for place in range(count)]
    for request in requests[:_WARM_UP]:
        recommender.recommend([request])
    taken = []
    for request in requests:
        started = time.perf_counter()
        recommender.recommend([request])
        taken.append(1000 * (time.perf_counter() - started))
    return {"p50_ms": float(np.median(taken)), "p99_ms": float(np.quantile(taken, 0.99)), "requests": count, "k": k}
