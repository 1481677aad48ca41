# SPDX-License-Identifier: Apache-2.0
"""Keeps bundles up with the log of changes.

A loaded bundle never changes: each change makes another one beside it, which shares its weights.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np

from recsys.bundle.bundle import Bundle
from recsys.core.errors import CannotScoreNewItems, RecsysError
from recsys.core.schema import ITEM
from recsys.inference.growth import Grower
from recsys.inference.request import InvalidRequest
from serving.engine.loaded import Loaded
from serving.live.changes import Change, Standing, Wanted, check
from serving.live.log import ChangeLog, LogHasGoneOn

log = logging.getLogger("serving")

_ATTEMPTS = 10


@dataclass(frozen=True, eq=False)
class Applied:
    """Up to where a loaded bundle has been kept up.

    Attributes:
        change: the id of the last change.
        until: when a block that was applied ends.
        base: bool ``[N]``, the live bits that the bundle came with.
        grower: encodes further items as those of the bundle.
        refused: items that the bundle cannot take, and why.
    """

    change: int
    until: datetime | None
    base: np.ndarray
    grower: Grower
    refused: dict[str, str]


class LiveCatalogue:
    """See the module. Several threads may use it.

    Args:
        changes: the log.
        clock: the present, UTC.
    """

    def __init__(self, changes: ChangeLog, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._changes, self._clock = changes, clock
        self._lock = threading.RLock()
        self._standings: dict[str, Standing] = {}

    def change(self, loaded: Loaded, wanted: Sequence[Wanted], *, actor: str, reason: str) -> list[Change]:
        """Write changes down, all or none, if they make sense for the bundle that answers now; `kept_up` then applies them.

        Raises:
            CannotScoreNewItems: an item is to be added, and the bundle's retriever is bound to the items of its training.
            InvalidRequest: a change makes no sense; names it.
            RecsysError: the items cannot be encoded, or the log cannot be written.
        """
        for _ in range(_ATTEMPTS):
            with self._lock:
                standing = self._standing(loaded.name)
                self._check(loaded, standing, wanted)
                try:
                    found = self._changes.append(loaded.name, wanted, after=standing.latest, actor=actor, reason=reason, now=self._clock())
                except LogHasGoneOn:
                    continue
                standing.apply(found)
                return found
        raise InvalidRequest(f"{loaded.name}: others change the catalogue all the time: try again")

    def kept_up(self, loaded: Loaded) -> Loaded:
        """The bundle with all changes that its catalogue does not have yet: itself, where there are none.

        An item that a bundle brings along is its own, whatever was added under its id before; what was removed or is blocked is so in
        every bundle.
        """
        with self._lock:
            standing, now = self._standing(loaded.name), self._clock()
            applied = loaded.applied
            if not isinstance(applied, Applied):
                if standing.latest == 0:
                    return loaded
                bundle = loaded.recommender.bundle
                bundle = replace(bundle, catalogue=bundle.catalogue.copy())
                applied = Applied(0, None, loaded.recommender.view.live, Grower(bundle), {})
            elif applied.change == standing.latest and (applied.until is None or now < applied.until):
                return loaded
            else:
                bundle = loaded.recommender.bundle
            bundle, refused = _grown(bundle, applied, standing)
            _set_live(bundle, applied.base, standing, now)
            applied = replace(applied, change=standing.latest, until=standing.next_end(now), refused=refused)
            return loaded.over(bundle, applied)

    def refused(self, loaded: Loaded) -> dict[str, str]:
        """The added items that a bundle cannot take, and why."""
        return dict(loaded.applied.refused) if isinstance(loaded.applied, Applied) else {}

    def _standing(self, model: str) -> Standing:
        """Where the items stand after all that the log holds by now."""
        standing = self._standings.setdefault(model, Standing())
        standing.apply(self._changes.since(model, standing.latest))
        return standing

    def _check(self, loaded: Loaded, standing: Standing, wanted: Sequence[Wanted]) -> None:
        view, now = loaded.recommender.view, self._clock()
        known = set(standing.added)
        for each in wanted:
            check(each, each.item_id in known or int(view.rows([each.item_id])[0]) >= 0, now)
            if each.action == "add":
                known.add(each.item_id)
        added = [{**each.attributes, ITEM: each.item_id} for each in wanted if each.action == "add"]
        if added:
            bundle = loaded.recommender.bundle
            grower = loaded.applied.grower if isinstance(loaded.applied, Applied) else Grower(bundle)
            grower.prepare(bundle, grower.table(added))


def _grown(bundle: Bundle, applied: Applied, standing: Standing) -> tuple[Bundle, dict[str, str]]:
    """The bundle with the added items that it lacks, and those that it cannot take."""
    view, refused = bundle.catalogue.snapshot(), dict(applied.refused)
    ids = [item for item in standing.added if item not in refused]
    missing = [item for item, row in zip(ids, view.rows(ids), strict=True) if row < 0]
    if not missing:
        return bundle, refused
    try:
        return _with(bundle, applied.grower, standing, missing), refused
    except CannotScoreNewItems as error:
        log.warning("%d added items are not in the catalogue: %s", len(missing), error)
        return bundle, refused | dict.fromkeys(missing, str(error))
    except RecsysError:
        # One item that cannot be encoded is no reason to leave out the others.
        for item in missing:
            try:
                bundle = _with(bundle, applied.grower, standing, [item])
            except RecsysError as error:
                log.warning("item %r was added, but cannot be encoded: %s", item, error)
                refused[item] = str(error)
        return bundle, refused


def _with(bundle: Bundle, grower: Grower, standing: Standing, items: Sequence[str]) -> Bundle:
    table = grower.table([{**standing.added[item], ITEM: item} for item in items])
    return grower.grow(bundle, grower.prepare(bundle, table))


def _set_live(bundle: Bundle, base: np.ndarray, standing: Standing, now: datetime) -> None:
    """Bring the live bits to what the bundle came with, the removals and the present blocks say."""
    view = bundle.catalogue.snapshot()
    live = np.ones(view.count, bool)
    live[: len(base)] = base
    for removed in (True, False):
        rows = view.rows([item for item, found in standing.removed.items() if found is removed])
        live[rows[rows >= 0]] = not removed
    rows = view.rows(sorted(standing.blocks(now)))
    live[rows[rows >= 0]] = False
    for value in (True, False):
        bundle.catalogue.set_live(view.take(np.flatnonzero((live == value) & (view.live != value))), value)
