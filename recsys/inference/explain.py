# SPDX-License-Identifier: Apache-2.0
"""Which events of a history an item owes its place to, by taking each away (erasure: Li, Monroe & Jurafsky, arXiv 1612.08220).

The event is taken from what the retriever reads and from every aligned list that the ranker reads. Averages and counts over the
history stay as they are: they are not one event's doing, and the feature store alone could recompute them.
"""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from recsys.core.schema import REQUEST_TIME
from recsys.inference.frame import read_items
from recsys.inference.request import Reason

if TYPE_CHECKING:
    from recsys.inference.recommender import Recommender, Users

REASONS = 3


def explain(recommender: "Recommender", users: "Users", b: int, rows: np.ndarray, items: pa.Table) -> list[tuple[Reason, ...]]:
    """For each of the given items of request ``b``: up to three events whose absence lowers its score most.

    Args:
        recommender: the path that scored the items.
        users: the requests.
        b: which of them.
        rows: int64 ``[C]`` catalogue rows.
        items: their features, as they were read to rank them.
    """
    effect = erasure_effects(recommender, users, b, rows, items)
    history = users.table.column(recommender.bundle.settings.history_feature)[b].as_py() or []
    reasons = []
    for effects in effect.T:
        strongest = np.argsort(-effects, kind="stable")[:REASONS]
        reasons.append(tuple(Reason(history[j], float(effects[j])) for j in strongest if effects[j] > 0))
    return reasons


def erasure_effects(recommender: "Recommender", users: "Users", b: int, rows: np.ndarray, items: pa.Table | None = None) -> np.ndarray:
    """Float ``[L, C]``: how far the score of each of C items falls when event j of the L in the history is taken away.

    Args:
        recommender: the path that scored the items.
        users: the requests.
        b: which of them.
        rows: int64 ``[C]`` catalogue rows.
        items: their features; they are read where they are not given.
    """
    settings = recommender.bundle.settings
    one = users.table.slice(b, 1)
    length = len(one.column(settings.history_feature)[0].as_py() or [])
    if length == 0 or len(rows) == 0:
        return np.zeros((length, len(rows)), np.float32)
    without = _without_each(one, length, settings.history_columns)
    variants = recommender.users_from(pa.concat_tables([one, without]))
    if items is None:
        at = one.column(REQUEST_TIME).take(pa.array(np.zeros(len(rows), np.int64)))
        items = read_items(recommender.features, recommender.view.take(rows), at)
    candidates = recommender.score(variants, np.tile(rows, (length + 1, 1)))
    scored = recommender.rank(variants, candidates, items, np.tile(np.arange(len(rows)), length + 1))
    return np.asarray(scored.score[0] - scored.score[1:])


def _without_each(one: pa.Table, length: int, columns: tuple[str, ...]) -> pa.Table:
    """``length`` copies of a row; copy j lacks event j in every one of the aligned ``columns``."""
    kept = np.array([[i for i in range(length) if i != j] for j in range(length)], np.int64).reshape(length, length - 1)
    table = one.take(pa.array(np.zeros(length, np.int64)))
    offsets = pa.array(np.arange(length + 1) * (length - 1), pa.int32())
    for name in columns:
        values = one.column(name).combine_chunks().flatten().take(pa.array(kept.ravel()))
        lists = pa.ListArray.from_arrays(offsets, values).cast(table.schema.field(name).type)
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), lists)
    return table
