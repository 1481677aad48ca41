# SPDX-License-Identifier: Apache-2.0
"""Searching the titles and the users that a loaded bundle knows."""

from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa

from recsys.core.schema import TIME
from serving.engine import Loaded
from serving.engine.verify import NOBODY

_REMEMBERED = 200


@dataclass(frozen=True)
class FoundUser:
    """A user, and how many events of the history the models would read."""

    user_id: str
    events: int


class Titles:
    """The titles of the live items of a bundle; an item without a title goes by its id."""

    def __init__(self, loaded: Loaded) -> None:
        view = loaded.recommender.view
        ids = view.take(view.live.nonzero()[0]).to_pylist()
        titles = ((item, loaded.titles.get(item) or item) for item in ids)
        self._entries = [(title.casefold(), title, item) for item, title in titles]

    def find(self, text: str, limit: int) -> list[tuple[str, str]]:
        """At most ``limit`` pairs of id and title that hold the text: first those that begin with it, then those with a word that does."""
        wanted = text.casefold().strip()
        found = [(_order(folded, wanted), folded, item, title) for folded, title, item in self._entries if wanted in folded]
        return [(item, title) for _, _, item, title in sorted(found)[:limit]]


def find_users(loaded: Loaded, text: str, limit: int, at: datetime) -> list[FoundUser]:
    """At most ``limit`` users: the one of this id, whether known or new, then users of the sample and recent ones that begin with the text.

    Reads the features of those that it finds; call it off the event loop.

    Raises:
        FeatureStoreError: the store does not answer.
    """
    wanted = text.strip()
    known = (user for user in (*loaded.sample, *loaded.memory.newest(_REMEMBERED)) if user.startswith(wanted) and user != NOBODY)
    ids = list(dict.fromkeys([*([wanted] if wanted else []), *known]))[:limit]
    if not ids:
        return []
    history = loaded.recommender.users(ids, pa.array([at] * len(ids), TIME)).history
    counts = (int(end - start) for start, end in zip(history.offsets[:-1], history.offsets[1:], strict=True))
    return [FoundUser(user, events) for user, events in zip(ids, counts, strict=True) if events or user == wanted]


def _order(folded: str, wanted: str) -> int:
    if folded.startswith(wanted):
        return 0
    return 1 if f" {wanted}" in folded else 2
