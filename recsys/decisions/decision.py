# SPDX-License-Identifier: Apache-2.0
"""What was decided for one request, and on what evidence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from recsys.core.errors import DataError
from recsys.inference.request import Request, Response

if TYPE_CHECKING:
    from recsys.inference.recommender import Ranked, Recommender, Users

RequestKind = Literal["recommend", "rank"]

_OPINIONS = (("log_probability", pa.float32()), ("probability", pa.float32()), ("score", pa.float32()))
CANDIDATES = pa.schema([("item_id", pa.string()), *_OPINIONS])
SHOWN = pa.schema([("item_id", pa.string()), ("position", pa.int32()), *_OPINIONS, ("propensity", pa.float64())])


@dataclass(frozen=True)
class Evidence:
    """What a decision was computed from, enough to compute it again.

    Attributes:
        candidates: the columns `CANDIDATES`, one row for each, in the order in which they were retrieved or given.
        wanted: how many places the retriever was asked to fill.
        user: one row of user features with their statuses; None where none was to be had.
        items: the item features with their statuses, one row for each candidate; None where the ranker read none.
        seen: string, the items that were not to be shown again; None where they played no part.
    """

    candidates: pa.Table
    wanted: int
    user: pa.Table | None
    items: pa.Table | None
    seen: pa.Array | None


@dataclass(frozen=True)
class Decision:
    """One answered request.

    Attributes:
        request_id: by which feedback names it; unique.
        time: of the request, for which features were read.
        user_id: who asked.
        k: how many items were asked for.
        kind: ``recommend``, or ``rank`` of given items.
        explain: whether reasons were asked for.
        model: the registered model's name.
        bundle: the SHA-256 of the bundle that answered.
        version: its number in the registry, where it is known.
        feature_versions: of the services, as the bundle pins them.
        flags: of the response.
        shown: the columns `SHOWN`, from position 1 on.
        evidence: None where it was not kept.
    """

    request_id: str
    time: datetime
    user_id: str
    k: int
    kind: RequestKind
    explain: bool
    model: str
    bundle: str
    version: int | None
    feature_versions: Mapping[str, str]
    flags: tuple[str, ...]
    shown: pa.Table
    evidence: Evidence | None


def decision_of(
    recommender: "Recommender",
    request: Request,
    response: Response,
    evidence: Evidence | None,
    *,
    request_id: str,
    kind: RequestKind,
    version: int | None = None,
    propensities: Sequence[float] | None = None,
) -> Decision:
    """The decision that answered a request.

    Args:
        recommender: the path that answered.
        request: what was asked.
        response: what was answered; its flags are the decision's.
        evidence: see `evidence_of`.
        request_id: see `Decision`.
        kind: see `Decision`.
        version: see `Decision`.
        propensities: of each shown item, the probability of its place under the policy that made the list; by default 1, that of a list
            which could not have been another one.

    Raises:
        DataError: there is not one propensity in (0, 1] for each shown item.
    """
    manifest = recommender.bundle.manifest
    return Decision(
        request_id=request_id,
        time=request.at,
        user_id=request.user_id,
        k=request.k,
        kind=kind,
        explain=request.explain,
        model=manifest.name,
        bundle=response.bundle,
        version=version,
        feature_versions=manifest.feature_versions,
        flags=response.flags,
        shown=shown_of(response, propensities),
        evidence=evidence,
    )


def shown_of(response: Response, propensities: Sequence[float] | None = None) -> pa.Table:
    """The columns `SHOWN` of a response; see `decision_of`."""
    items = response.items
    given = [1.0] * len(items) if propensities is None else list(propensities)
    if len(given) != len(items) or not all(0 < propensity <= 1 for propensity in given):
        raise DataError(f"propensities: expected one above 0 and up to 1 for each of the {len(items)} shown items, got {given}")
    columns = {
        "item_id": [item.item_id for item in items],
        "position": list(range(1, len(items) + 1)),
        "log_probability": [item.log_probability for item in items],
        "probability": [item.probability for item in items],
        "score": [item.score for item in items],
        "propensity": given,
    }
    return pa.table(columns, schema=SHOWN)


def evidence_of(recommender: "Recommender", users: "Users", ranked: "Ranked", b: int, *, kind: RequestKind) -> Evidence:
    """What request ``b`` of a batch was answered from.

    Args:
        recommender: the path that answered.
        users: the requests of the batch.
        ranked: their candidates.
        b: which of them.
        kind: what the request asked for: given items are ranked whether they were seen or not.
    """
    present = ranked.candidates.rows >= 0
    first, mine = int(present[:b].sum()), present[b]
    candidates = {
        "item_id": recommender.view.take(ranked.candidates.rows[b][mine]),
        "log_probability": np.asarray(ranked.candidates.log_probability[b][mine], np.float32),
        "probability": np.asarray(ranked.probability[b][mine], np.float32),
        "score": np.asarray(ranked.score[b][mine], np.float32),
    }
    seen = users.seen.values[users.seen.offsets[b] : users.seen.offsets[b + 1]]
    return Evidence(
        candidates=pa.table(candidates, schema=CANDIDATES),
        wanted=ranked.candidates.rows.shape[1],
        user=users.table.slice(b, 1),
        items=ranked.items.slice(first, int(mine.sum())),
        seen=recommender.view.take(seen) if kind == "recommend" else None,
    )
