# SPDX-License-Identifier: Apache-2.0
"""What a bundle would recommend if a user's history were another one, and what each event of it does to each item."""

import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np
import pyarrow as pa

from recsys.core.schema import TIME
from recsys.core.status import ValueStatus, status_column
from recsys.data.jagged import Jagged
from recsys.inference.explain import erasure_effects
from recsys.inference.recommender import Recommender, Users
from recsys.inference.request import InvalidRequest, Request, Response


@dataclass(frozen=True)
class Supposed:
    """The answer to a supposition.

    Attributes:
        history: item ids of the events that the models read, oldest first.
        response: the list; reasons are left out, since ``effects`` says more.
        effects: float32 ``[L, C]``: how far the score of each of the C items falls when event j of the L in the history is taken away.
        stages: seconds by stage.
    """

    history: tuple[str, ...]
    response: Response
    effects: np.ndarray
    stages: dict[str, float]


def suppose(recommender: Recommender, user_id: str, history: Sequence[str] | None, k: int, at: datetime) -> Supposed:
    """The list for a user whose history were ``history``, oldest first; None leaves the user's own.

    An event that is the user's own keeps its values, such as a rating; of an added one nothing but the item is known. What was taken out of
    the history may be recommended again, and what is in it may not. Averages and counts over the history stay as they are, as in
    `recsys.inference.explain`.

    Raises:
        InvalidRequest: the history names an item that is neither in the catalogue nor of the user's own history.
    """
    clock = _Stages()
    users = recommender.users([user_id], pa.array([at], TIME))
    if history is not None:
        users = _with_history(recommender, users, history)
    clock.ends("features")
    request = Request(user_id=user_id, k=k, at=at)
    candidates = recommender.retrieve(users, recommender.wanted([request]))
    clock.ends("retrieve")
    items = recommender.items(users, candidates)
    clock.ends("items")
    response = recommender.respond(request, 0, users, recommender.rank(users, candidates, items))
    clock.ends("rank")
    effects = erasure_effects(recommender, users, 0, recommender.view.rows([item.item_id for item in response.items]))
    clock.ends("explain")
    return Supposed(_events(recommender, users.table), response, effects, clock.stages)


def _with_history(recommender: Recommender, users: Users, history: Sequence[str]) -> Users:
    settings = recommender.bundle.settings
    own = _events(recommender, users.table)
    places = _places(own, history)
    _check_known(recommender, [item for item, place in zip(history, places, strict=True) if place is None])
    table = users.table
    for name in settings.history_columns:
        table = _set(table, name, _taken(table.column(name), places))
    table = _set(table, settings.history_feature, pa.array([list(history)]))
    changed = recommender.users_from(table)
    return replace(changed, seen=_seen(recommender, users.seen, own, history))


def _places(own: Sequence[str], history: Sequence[str]) -> list[int | None]:
    """Which own event each event of the history is, None for an added one. An item that is there twice stands for two events."""
    free: dict[str, deque[int]] = defaultdict(deque)
    for place, item in enumerate(own):
        free[item].append(place)
    return [free[item].popleft() if free[item] else None for item in history]


def _check_known(recommender: Recommender, added: list[str]) -> None:
    rows = recommender.view.rows(added)
    if len(rows) and (rows < 0).any():
        raise InvalidRequest(f"history: {added[int(np.argmin(rows))]!r} is not in the catalogue")


def _taken(column: pa.ChunkedArray, places: list[int | None]) -> pa.Array:
    """One list: the elements of the column's only list at the places, null at None."""
    whole = column.combine_chunks().flatten()
    offsets = pa.array([0, len(places)], pa.int32())
    return pa.ListArray.from_arrays(offsets, whole.take(pa.array(places, pa.int64())))


def _set(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    field = table.schema.field(name)
    table = table.set_column(table.schema.get_field_index(name), field, values.cast(field.type))
    status = status_column(name)
    if status not in table.column_names:
        return table
    known = table.schema.field(status)
    return table.set_column(table.schema.get_field_index(status), known, pa.array([ValueStatus.PRESENT], known.type))


def _seen(recommender: Recommender, seen: Jagged, own: Sequence[str], history: Sequence[str]) -> Jagged:
    """Not to be recommended: what the user saw before, without what was taken out, and the history."""
    kept = recommender.bundle.catalogue.rows(list(history))
    out = recommender.bundle.catalogue.rows([item for item in own if item not in set(history)])
    rows = np.unique(np.concatenate([np.setdiff1d(seen.values, out), kept[kept >= 0]]))
    return Jagged(rows, np.array([0, len(rows)], np.int64))


def _events(recommender: Recommender, table: pa.Table) -> tuple[str, ...]:
    return tuple(table.column(recommender.bundle.settings.history_feature)[0].as_py() or ())


class _Stages:
    """Times stages that follow each other."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._began = time.monotonic()

    def ends(self, stage: str) -> None:
        now = time.monotonic()
        self.stages[stage], self._began = now - self._began, now
