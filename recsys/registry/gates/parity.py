# SPDX-License-Identifier: Apache-2.0
"""Whether a bundle computes what was served: by the decisions that it made itself, or else by the requests that it was recorded with."""

import math
from collections import deque
from pathlib import Path
from typing import Any

from recsys.bundle.bundle import Bundle
from recsys.core.errors import BundleError
from recsys.decisions.parts import decisions_of
from recsys.decisions.replay import ReplayReport, replay
from recsys.inference import golden
from recsys.inference.recommender import Recommender
from recsys.inference.recorded import RecordedReader
from recsys.ranking.mixers import fold_mixing
from recsys.registry.gates.served import DECISIONS, GOLDEN

MOST = 1000
"""Decisions that are computed again: the last ones that hold their evidence. Each is computed alone."""


def replay_own(bundle: Bundle, folder: Path) -> ReplayReport:
    """Compute the last decisions that a bundle made itself again, up to `MOST`.

    Those of other bundles say nothing: their models are others.

    Args:
        bundle: the candidate; what depends on its parameters alone is computed in it once, as the server does.
        folder: of a decision log.

    Raises:
        DataError, SchemaError: a part of the log is damaged or of another kind.
    """
    own = deque((each for each in decisions_of(folder, bundle.manifest.sha256) if each.evidence is not None), maxlen=MOST)
    if own:
        fold_mixing(bundle.ranker)
    return replay(bundle, own)


def of_decisions(largest_difference: float, rows: int) -> dict[str, Any]:
    """What a replay of decisions found, as the gate reads it."""
    return _measured(largest_difference, rows, DECISIONS)


def of_golden(bundle: Bundle) -> dict[str, Any] | None:
    """What the requests that a bundle was recorded with say, as the gate reads it; None where it has none."""
    if bundle.golden is None:
        return None
    rows = sum(len(request.item_ids) for request in bundle.golden.requests)
    try:
        report = golden.check(Recommender(bundle, RecordedReader()), tolerance=math.inf)
    except BundleError:
        # A list of another length, or a score that is no number: no difference says how far that is.
        return _measured(math.inf, rows, GOLDEN)
    return None if report is None else _measured(report.largest_difference, rows, GOLDEN)


def _measured(difference: float, rows: int, source: str) -> dict[str, Any]:
    """Plain values; JSON has no number for what is infinite."""
    value = float(difference) if math.isfinite(difference) else "infinity"
    return {"max_difference": value, "rows": int(rows), "source": source}
