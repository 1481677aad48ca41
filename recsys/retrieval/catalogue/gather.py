# SPDX-License-Identifier: Apache-2.0
"""Exact search by gathering: an item's score is the sum of its codes' log-probabilities, looked up slot by slot.

Where no slot is conditioned on another (RPG, RecGPT), ``s(u, i) = Σ_k log p_k(c_k(i) | u)``: an embedding bag whose bags are the items
and whose rows are the B users' log-probabilities of one code. It reads N · K rows of width B one after another, where indexing
user by user would read N · K · B single numbers. Where there is a compiler, sums and comparison with the k-th best score so far are one
loop (`kernels.gather_topk`), and no score is written but those of the lists. Else items go through PyTorch's bag in tiles, of which
the running k-th best lets few items pass.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kernels.gather_topk import Bags, gather_topk
from kernels.gather_topk.native import available
from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.retrieval.catalogue.code_index import CodeIndex, users_of_codes
from recsys.retrieval.catalogue.index import Array, Exclude, Excluded, IndexMeta, check_k
from recsys.retrieval.catalogue.live import CatalogueView
from recsys.retrieval.catalogue.topk import best, keys_of, scores_of
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.state import SlotLogProbs

_BLOCK = 32  # items whose best score is compared with the running k-th best at once
_USERS_AT_ONCE = 64
_FIRST_TILE = 512

Hits: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]  # user, row, score


@register("index", "gather")
class GatherIndex(CodeIndex):
    """Codes of all rows of a catalogue, scored exactly for every user.

    Args:
        config: see `Config`.
        table: the codes.
        meta: what they were made from.
    """

    accepts: ClassVar[tuple[type, ...]] = (SlotLogProbs,)

    class Config(BaseConfig):
        """Configuration.

        Attributes:
            tile: how many items are scored at once, for up to 64 users, where the search is not native; what bounds the memory beside the
                codes.
        """

        name: Literal["gather"] = "gather"
        tile: int = Field(16384, ge=_BLOCK, multiple_of=_BLOCK)

    config: Config

    def __init__(self, config: Config, table: CodeTable, meta: IndexMeta) -> None:
        super().__init__(config, table, meta)
        self._native = available()  # compiled where it was not yet: now, and not in the first search

    def search(
        self, state: SlotLogProbs, k: int, view: CatalogueView, exclude: Exclude | None = None, scorable: Array | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`."""
        check_k(k)
        values_bkv, allowed = self._log_probs(state), self._allowed(view, scorable)
        excluded = self._excluded(exclude, len(values_bkv), allowed)
        rows = np.full((len(values_bkv), k), -1, np.int64)
        scores = np.full((len(values_bkv), k), -np.inf, np.float32)
        live = None if allowed.all() else torch.from_numpy(np.flatnonzero(allowed))
        for users in np.split(np.arange(len(values_bkv)), range(_USERS_AT_ONCE, len(values_bkv), _USERS_AT_ONCE)):
            if len(users):
                own = excluded.of(users, len(values_bkv))
                rows[users], scores[users] = self._search(values_bkv[torch.from_numpy(users)], k, live, own)
        return rows, scores

    def score(self, state: SlotLogProbs, rows: np.ndarray) -> np.ndarray:
        """See `Index.score`."""
        values_bkv = self._log_probs(state)
        rows = self._check_lists(rows, len(values_bkv))
        codes_bck = self._codes_of(rows)
        users = torch.arange(len(values_bkv))[:, None]
        scores = torch.zeros(rows.shape)
        for slot in range(self.table.levels):
            scores += values_bkv[users, slot, codes_bck[..., slot]]
        return np.where(rows >= 0, scores.numpy(), np.float32(-np.inf))

    def score_all(self, state: SlotLogProbs) -> np.ndarray:
        """float32 ``[B, N]``: the scores of all rows, live or not. Errors as for `search`."""
        weights = users_of_codes(self._log_probs(state))
        scores_bn = np.empty((weights.shape[1], len(self._bags)), np.float32)
        for start in range(0, len(self._bags), self.config.tile):
            part = slice(start, start + self.config.tile)
            scores_bn[:, part] = functional.embedding_bag(self._bags[part], weights, mode="sum").T.numpy()
        return scores_bn

    def log_partition(self, state: SlotLogProbs, view: CatalogueView, scorable: Array | None = None) -> np.ndarray:
        """See `Index.log_partition`."""
        return self._slot_log_partition(self._log_probs(state), self._allowed(view, scorable))

    @cached_property
    def _checked(self) -> Bags:
        """The bags, for the native search."""
        return Bags(self._bags, self.table.levels * max(self.table.level_sizes))

    def _search(self, values_bkv: Tensor, k: int, live: Tensor | None, excluded: Excluded) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores ``[B, k]``, among the rows in ``live`` (ascending), or all."""
        weights = users_of_codes(values_bkv)
        if self._native:
            offsets = np.searchsorted(excluded.query, np.arange(len(values_bkv) + 1))
            rows_of_live = None if live is None else live.numpy()
            return best(gather_topk(weights, self._checked, k, rows_of_live, offsets, excluded.row), k)
        users, count = len(values_bkv), len(self._bags) if live is None else len(live)
        kept = _Best(users, k)
        places = excluded.row if live is None else np.searchsorted(live.numpy(), excluded.row)
        order = np.argsort(places, kind="stable")
        places, whose = places[order], torch.from_numpy(excluded.query[order])
        for start, stop in _tiles(count, self.config.tile):
            bags = self._bags[start:stop] if live is None else self._bags[live[start:stop]]
            scores_nb = functional.embedding_bag(bags, weights, mode="sum")
            first, last = np.searchsorted(places, (start, stop))
            if last > first:
                scores_nb[torch.from_numpy(places[first:last] - start), whose[first:last]] = -torch.inf
            kept.add(scores_nb, start)
        rows, scores = kept.lists()
        if live is not None:
            rows = np.append(live.numpy(), -1)[rows]
        return rows, scores


def _tiles(count: int, largest: int) -> Iterator[tuple[int, int]]:
    """Where tiles begin and end. The first are small, as all of their items pass until there is a k-th best."""
    start, size = 0, min(_FIRST_TILE, largest)
    while start < count:
        yield start, min(start + size, count)
        start, size = start + size, min(2 * size, largest)


class _Best:
    """The k best of each of B users so far.

    A tile's items are looked at only where their score is above the user's k-th best; and that is asked first of whole blocks. What passes
    waits until it is k for each user, and then moves the k-th best up.

    Args:
        users: B.
        k: of each list.
    """

    def __init__(self, users: int, k: int) -> None:
        self._k = k
        self._keys = np.zeros((users, k), np.uint64)
        self._threshold = torch.full((users,), -torch.inf)
        self._waiting: list[Hits] = []
        self._room = users * k

    def add(self, scores_nb: Tensor, first: int) -> None:
        """Take in the scores ``[n, B]`` of the items ``first`` and following; an item of -inf never comes back."""
        user, place, score = self._hits(scores_nb)
        if len(user):
            self._waiting.append((user, place + first, score))
            if sum(len(hits[0]) for hits in self._waiting) >= self._room:
                self._merge()

    def lists(self) -> tuple[np.ndarray, np.ndarray]:
        """Places and scores ``[B, k]``, best first; -1 and -inf where there are no more."""
        if self._waiting:
            self._merge()
        return best(self._keys, self._k)

    def _merge(self) -> None:
        user, place, score = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        keys, counts = keys_of(score, place), np.bincount(user, minlength=len(self._keys))
        order = np.argsort(user, kind="stable")
        column = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
        found = np.zeros((len(self._keys), counts.max()), np.uint64)
        found[user[order], column] = keys[order]
        self._keys = _largest(np.concatenate((self._keys, found), axis=1), self._k)
        self._threshold = torch.from_numpy(scores_of(self._keys.min(axis=1)))

    def _hits(self, scores_nb: Tensor) -> Hits:
        """User, place and score of what is above the user's threshold: at the same score, the items before have smaller rows."""
        rest = len(scores_nb) % _BLOCK
        body, tail = (scores_nb[: len(scores_nb) - rest], scores_nb[len(scores_nb) - rest :]) if rest else (scores_nb, scores_nb[:0])
        blocks_mtb = body.unflatten(0, (-1, _BLOCK)) if len(body) else body.reshape(0, _BLOCK, body.shape[1])
        block, user = (blocks_mtb.amax(1) > self._threshold).nonzero(as_tuple=True)
        candidates = blocks_mtb[block, :, user]
        which, offset = (candidates > self._threshold[user, None]).nonzero(as_tuple=True)
        place, late = (tail > self._threshold).nonzero(as_tuple=True)
        users = torch.cat((user[which], late))
        places = torch.cat((block[which] * _BLOCK + offset, place + len(body)))
        scores = torch.cat((candidates[which, offset], tail[place, late]))
        return users.numpy(), places.numpy(), scores.numpy()


def _largest(keys_bc: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row, in any order."""
    return np.partition(keys_bc, keys_bc.shape[1] - k, axis=1)[:, -k:] if keys_bc.shape[1] > k else keys_bc
