# SPDX-License-Identifier: Apache-2.0
"""The features of a recorded decision, as the recommendation path reads them."""

import pyarrow as pa
import pyarrow.compute as pc

from recsys.core.errors import DataError
from recsys.core.schema import ITEM, REQUEST_TIME, USER
from recsys.core.status import STATUS_SUFFIX, ValueStatus, status_column
from recsys.decisions.decision import Decision
from recsys.inference.frame import ITEM_SERVICE, SEEN_SERVICE, USER_SERVICE


class RecordedReader:
    """A `recsys.inference.features.FeatureReader` over one decision at a time, which must hold its evidence.

    An entity that was not recorded has every feature MISSING; what was seen, where that was not recorded, is nothing.

    Args:
        seen_feature: what the bundle calls the list of seen items.
    """

    def __init__(self, seen_feature: str) -> None:
        self._seen_feature = seen_feature
        self._services: dict[str, tuple[str, pa.Table]] = {}

    def show(self, decision: Decision) -> None:
        """Answer from this decision from now on.

        Raises:
            DataError: it does not hold the features that were served.
        """
        evidence = decision.evidence
        if evidence is None or evidence.user is None or evidence.items is None:
            raise DataError(f"decision {decision.request_id!r}: the features that were served were not recorded")
        seen = pa.array([[] if evidence.seen is None else evidence.seen.to_pylist()], pa.list_(pa.string()))
        status = pa.array([ValueStatus.PRESENT], pa.uint8())
        self._services = {
            USER_SERVICE: (USER, _keyed(evidence.user, USER, pa.array([decision.user_id]))),
            SEEN_SERVICE: (
                USER,
                pa.table([[decision.user_id], seen, status], [USER, self._seen_feature, status_column(self._seen_feature)]),
            ),
            ITEM_SERVICE: (ITEM, _keyed(evidence.items, ITEM, evidence.candidates.column(ITEM))),
        }

    def read(self, service: str, spine: pa.Table) -> pa.Table:
        """See `recsys.inference.features.FeatureReader.read`.

        Raises:
            DataError: no such service was recorded.
        """
        if service not in self._services:
            raise DataError(f"service {service!r}: recorded are {', '.join(sorted(self._services)) or 'none'}")
        key, recorded = self._services[service]
        places = pc.index_in(spine.column(key).combine_chunks(), value_set=recorded.column(key).combine_chunks())
        for name in recorded.column_names:
            if name in (key, REQUEST_TIME):
                continue
            values = recorded.column(name).combine_chunks().take(places)
            if name.endswith(STATUS_SUFFIX):
                values = values.fill_null(pa.scalar(int(ValueStatus.MISSING), values.type))
            spine = spine.append_column(recorded.schema.field(name), values)
        return spine


def _keyed(features: pa.Table, key: str, ids: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The features beside the ids that they were recorded for."""
    rest = features.drop_columns([key]) if key in features.column_names else features
    return rest.add_column(0, pa.field(key, pa.string()), ids)
