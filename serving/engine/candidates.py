# SPDX-License-Identifier: Apache-2.0
"""The candidates of a batch: retrieved once for equal histories, scored where the caller gave them, and padded to one width."""

import hashlib
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from recsys.data.jagged import Jagged, gather
from recsys.inference.recommender import Candidates, Recommender, Users
from serving.engine.cache import LRU
from serving.engine.entry import Entry
from serving.engine.loaded import Loaded
from serving.engine.remembering import Memory


class Key(NamedTuple):
    """What a retrieved list of one bundle depends on, and nothing else."""

    history: bytes
    seen: bytes
    length: int
    catalogue: str


CandidateCache: TypeAlias = LRU[Key, tuple[np.ndarray, np.ndarray]]


class CandidateCaches:
    """The cache of each bundle, which goes with it: nobody asks again for the lists of a bundle that was let go.

    Args:
        capacity: lists of each bundle.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # By what a bundle shares with itself over other states of its catalogue.
        self._caches: weakref.WeakKeyDictionary[Memory, CandidateCache] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._caches)

    def of(self, loaded: Loaded) -> CandidateCache:
        """The cache of a bundle."""
        found = self._caches.get(loaded.memory)
        if found is None:
            found = self._caches[loaded.memory] = LRU(self._capacity)
        return found


def key_of(entry: Entry, users: Users, b: int) -> Key:
    """The key of user ``b``."""
    view = entry.loaded.recommender.view
    return Key(_digest(users.history, b), _digest(users.seen, b), entry.rows, view.version.digest)


def list_of(jagged: Jagged, b: int) -> np.ndarray:
    """int64: list ``b``."""
    values: np.ndarray = jagged.values[jagged.offsets[b] : jagged.offsets[b + 1]]
    return values


def take_users(recommender: Recommender, users: Users, places: Sequence[int]) -> Users:
    """These users alone, in this order."""
    if list(places) == list(range(users.table.num_rows)):
        return users
    chosen = np.asarray(places, np.int64)
    lengths = np.diff(users.seen.offsets)[chosen]
    seen = gather(users.seen.values, users.seen.offsets[chosen], lengths)
    return replace(recommender.users_from(users.table.take(pa.array(chosen))), seen=seen)


def scored(recommender: Recommender, users: Users, rows: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The retriever's log-probabilities of lists of different lengths, one for each user."""
    found = recommender.score(users, padded(rows, -1, np.int64))
    return [(own, found.log_probability[b, : len(own)]) for b, own in enumerate(rows)]


def together(lists: Iterable[tuple[np.ndarray, np.ndarray]]) -> Candidates:
    """Lists of different lengths as one batch; -1 and -inf where there is no item."""
    rows, log_probability = zip(*lists, strict=True)
    return Candidates(padded(rows, -1, np.int64), padded(log_probability, -np.inf, np.float32))


def padded(lists: Sequence[np.ndarray], empty: float, dtype: type) -> np.ndarray:
    """``[B, C]``, where C is the length of the longest of B lists."""
    array: np.ndarray = np.full((len(lists), max(map(len, lists))), empty, dtype)
    for b, values in enumerate(lists):
        array[b, : len(values)] = values
    return array


def _digest(jagged: Jagged, b: int) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(list_of(jagged, b), np.int64).tobytes(), digest_size=16).digest()
