# SPDX-License-Identifier: Apache-2.0
"""The features of a recorded decision, for a `recsys.inference.recorded.RecordedReader`."""

import pyarrow as pa

from recsys.core.errors import DataError
from recsys.core.schema import ITEM, REQUEST_TIME, USER
from recsys.core.status import ValueStatus, status_column
from recsys.decisions.decision import Decision
from recsys.inference.frame import ITEM_SERVICE, SEEN_SERVICE, USER_SERVICE


def recorded_features(decision: Decision, seen_feature: str) -> dict[str, pa.Table]:
    """By service, what a decision was made from, whatever the time; what was seen, where that was not recorded, is nothing.

    Args:
        decision: it must hold its evidence.
        seen_feature: what the bundle calls the list of seen items.

    Raises:
        DataError: it does not hold the features that were served.
    """
    evidence = decision.evidence
    if evidence is None or evidence.user is None or evidence.items is None:
        raise DataError(f"decision {decision.request_id!r}: the features that were served were not recorded")
    seen = pa.array([[] if evidence.seen is None else evidence.seen.to_pylist()], pa.list_(pa.string()))
    status = pa.array([ValueStatus.PRESENT], pa.uint8())
    return {
        USER_SERVICE: _keyed(evidence.user, USER, pa.array([decision.user_id])),
        SEEN_SERVICE: pa.table([[decision.user_id], seen, status], [USER, seen_feature, status_column(seen_feature)]),
        ITEM_SERVICE: _keyed(evidence.items, ITEM, evidence.candidates.column(ITEM)),
    }


def _keyed(features: pa.Table, key: str, ids: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The features beside the ids that they were recorded for."""
    rest = features.drop_columns([name for name in (key, REQUEST_TIME) if name in features.column_names])
    return rest.add_column(0, pa.field(key, pa.string()), ids)
