# SPDX-License-Identifier: Apache-2.0
"""The slices of the test events on which a candidate is measured and compared, so that no mean over all hides one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.steps import measure
from pipelines.steps.histories import Histories
from pipelines.steps.prepared import Prepared
from recsys.core.errors import DataError, unknown
from recsys.core.schema import ITEM, USER

_OF_USERS = {"all": "all", "established": "established_user", "new": "new_user"}
_OF_TARGETS = {
    "warm": "warm_item",
    "cold": "cold_item",
    "head": "head_item",
    "tail": "tail_item",
    "cold_user": "cold_user",
    "empty_user": "empty_user",
}


def event_slices(prepared: Prepared, histories: Histories, columns: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Which test events are of which slice: bool ``[events]`` by name, in the order of the events.

    ``all``; ``new_user`` and ``established_user`` (`recsys.data.splits.evaluation_segments`); ``warm_item``, ``cold_item``, ``head_item``,
    ``tail_item``, ``cold_user`` and ``empty_user`` (`recsys.evaluation.retrieval.slices`); and ``column=value`` for every value of the
    given columns. Slices without events are left out.

    Args:
        prepared: the data.
        histories: of the same data.
        columns: of the interactions, the items or the users; each holds one string for a row.

    Raises:
        DataError: there is no such column, or it does not hold strings.
    """
    of_users, of_targets = prepared.segments(), histories.slices()
    slices = {name: of_users[segment] for segment, name in _OF_USERS.items()}
    slices |= {name: of_targets[kind] for kind, name in _OF_TARGETS.items()}
    for column in columns:
        values = _values(prepared, column)
        slices |= {f"{column}={value}": np.asarray(pc.equal(values, value).fill_null(False)) for value in _distinct(values)}
    return {name: mask for name, mask in slices.items() if mask.any()}


def figures(
    slices: measure.Segments, list_ranks: np.ndarray, labels: np.ndarray, probability: np.ndarray, users: np.ndarray, base_rate: float
) -> dict[str, dict[str, Any]]:
    """On every slice: how many events, the quality of the final list, and that of the ranker's probabilities."""
    return {
        name: {
            "events": int(mask.sum()),
            "list": measure.rank_metrics(list_ranks[mask]),
            "ranker": measure.ranking_metrics(labels[mask], probability[mask], users[mask], base_rate),
        }
        for name, mask in slices.items()
    }


def _values(prepared: Prepared, column: str) -> pa.Array:
    """The column's value at every test event, string."""
    dataset, events = prepared.dataset, prepared.parts["test"]
    if column in dataset.interactions.column_names:
        return _strings(column, events.column(column))
    tables = [(dataset.items, ITEM)] + ([] if dataset.users is None else [(dataset.users, USER)])
    for table, key in tables:
        if column in table.column_names:
            rows = pc.index_in(events.column(key), value_set=table.column(key).combine_chunks())
            return _strings(column, table.column(column).take(rows))
    names = {name for table in (dataset.interactions, *(table for table, _ in tables)) for name in table.column_names}
    raise DataError(f"evaluation.slices: {unknown('column', column, names)}")


def _strings(column: str, values: pa.ChunkedArray) -> pa.Array:
    try:
        return values.cast(pa.string()).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(f"evaluation.slices: column {column!r}: expected one string for each row, got {values.type}") from None


def _distinct(values: pa.Array) -> list[str]:
    return sorted(value for value in pc.unique(values).to_pylist() if value is not None)
