# SPDX-License-Identifier: Apache-2.0
"""Exact search by inner product over the concatenated slot vectors of the live items.

A set-of-tokens retriever scores an item by ``s(u, i) = Σ_k ⟨q_k(u), e_k(i)⟩``, which is one inner product of concatenated vectors
(SETRec, arXiv 2502.10833); so FAISS answers for the whole catalogue with neither beam nor trie.

Appended rows stand in a delta behind the main part, which the index before them and the one after share (`VectorRows`). Both parts are
asked, the lists are merged, and whatever the one or the other may have left out is compared.

The number of threads is left as the process has it: FAISS and torch share one OpenMP, and setting FAISS's would set torch's too.
"""

from copy import copy
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

# torch before FAISS, as everywhere in this project: whichever comes first owns the OpenMP settings.
import torch  # isort: skip
import faiss
import numpy as np

from recsys.core.components import register
from recsys.core.errors import BundleError, ConfigError, DataError
from recsys.core.files import new_directory
from recsys.retrieval.base import Retriever, VectorRetriever
from recsys.retrieval.catalogue.index import Array, Exclude, Excluded, Index, IndexMeta, check_k, matrix, parts, same
from recsys.retrieval.catalogue.live import CatalogueView
from recsys.retrieval.catalogue.placement import Device, Placed, placed, selection
from recsys.retrieval.catalogue.topk import best, keys_of
from recsys.retrieval.catalogue.vector_rows import Growth, VectorRows, flat_index, read_index
from recsys.retrieval.state import SlotVectors

_FLAT = "vectors.faiss"
# Once a user's over-fetch is more than one part in this many of the items to be searched, all scores and a mask cost less.
_EXACT_SHARE = 8


@register("index", "dense")
class DenseIndex(Index):
    """Exact inner-product index over all rows of a catalogue.

    Scores are float32 as computed: two items whose exact scores differ in the last bit only may change places between batch sizes.

    Args:
        config: see `Config`.
        flat: the vectors of rows 0 to N - 1. `build` makes it.
        meta: what they were built from.

    Raises:
        ConfigError: FAISS has no such device.
    """

    accepts: ClassVar[tuple[type, ...]] = (SlotVectors,)

    class Config(Growth):
        """Where it is searched, and besides how it grows (`Growth`).

        Attributes:
            device: ``cuda`` for FAISS on the first GPU. Vectors stay on the host as well, where it is saved from and where the delta
                and short and hard cases are compared.
        """

        name: Literal["dense"] = "dense"
        device: Device = "cpu"

    config: Any

    def __init__(self, config: Any, flat: faiss.IndexFlatIP, meta: IndexMeta) -> None:
        super().__init__(config, meta)
        self._rows = VectorRows.of(flat)
        self._placed = self._place()

    @classmethod
    def over(cls, config: Config, retriever: Retriever, view: CatalogueView) -> Self:
        """See `Index.over`."""
        if not isinstance(retriever, VectorRetriever):
            raise ConfigError(f"index 'dense' holds item vectors, and {type(retriever).__name__} has none")
        with torch.no_grad():
            vectors = retriever.eval().item_vectors()
        return cls.build(config, vectors, view, content_hash=retriever.fingerprint())

    @classmethod
    def build(cls, config: Config, vectors: Array, view: CatalogueView, *, content_hash: str) -> Self:
        """An index over item vectors.

        Args:
            config: the index's configuration.
            vectors: float ``[N, K * d]``, as `VectorRetriever.item_vectors` returns; kept as float32.
            view: the catalogue whose rows they are.
            content_hash: names the retriever that made them.

        Raises:
            DataError: the vectors are not a finite matrix with one row for each of the catalogue's.
        """
        rows = matrix(vectors, "vectors")
        if len(rows) != view.count:
            raise DataError(f"vectors: expected one for each of the catalogue's {view.count} rows, got {len(rows)}")
        return cls(config, flat_index(rows), cls._meta(view, content_hash, rows.shape[1]))

    def extended(self, vectors: Array, view: CatalogueView) -> Self:
        """An index with the rows that were appended since; the present one stays as it is, for those who read it.

        It shares the main part, and takes time and memory for the new rows and the delta alone; but where these are more than
        `Growth.delta` allows, it is `compacted`.

        Args:
            vectors: float ``[M, K * d]`` of the new rows, of the same retriever.
            view: the catalogue with its new rows.

        Raises:
            DataError: there is not one for each new row, or they have another width.
        """
        new = matrix(vectors, "vectors")
        if len(new) != view.count - self.meta.rows or new.shape[1] != self.meta.width:
            expected = f"[{view.count - self.meta.rows}, {self.meta.width}]"
            raise DataError(f"vectors: expected {expected}, one for each new row, got {list(new.shape)}")
        index = copy(self)
        index.meta = self._meta(view, self.meta.content_hash, self.meta.width)
        index._rows = self._rows.appended(new)
        return index if index._rows.delta.ntotal <= self.config.delta * index._rows.main.ntotal else index.compacted()

    def compacted(self) -> Self:
        """The index as if it were built anew of all its rows, with no delta; the present one stays as it is."""
        return type(self)(self.config, self._rows.merged(), self.meta) if self._rows.delta.ntotal else self

    def search(
        self, state: SlotVectors, k: int, view: CatalogueView, exclude: Exclude | None = None, scorable: Array | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`."""
        check_k(k)
        queries = self._queries(state)
        allowed = self._allowed(view, scorable)
        candidates = np.flatnonzero(allowed)
        excluded = self._excluded(exclude, len(queries), allowed)
        wanted = k + np.bincount(excluded.query, minlength=len(queries))

        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        in_main = int(np.searchsorted(candidates, self._rows.main.ntotal))
        exact = self._few_are_left(wanted, in_main)
        few = np.flatnonzero(~exact)
        if len(few):
            bitmap = None if len(candidates) == view.count else view.bitmap if scorable is None else _packed(allowed)
            share = in_main / max(self._rows.main.ntotal, 1)
            rows[few], scores[few], certain = self._over_fetch(
                queries[few], k, int(wanted[few].max()), bitmap, share, excluded.of(few, len(queries))
            )
            exact[few] = ~certain
        for part in parts(np.flatnonzero(exact), len(candidates)):
            rows[part], scores[part] = self._search_all(queries[part], k, candidates, excluded.of(part, len(queries)))
        return rows, scores

    def score(self, state: SlotVectors, rows: np.ndarray) -> np.ndarray:
        """See `Index.score`."""
        queries = self._queries(state)
        rows = self._check_lists(rows, len(queries))
        scores = np.full(rows.shape, -np.inf, np.float32)
        users, places = np.nonzero(rows >= 0)
        for part in parts(np.arange(len(users)), self.meta.width):
            user, place = users[part], places[part]
            scores[user, place] = np.einsum("ed,ed->e", self._rows.take(rows[user, place]), queries[user])
        return scores

    def log_partition(self, state: SlotVectors, view: CatalogueView, scorable: Array | None = None) -> np.ndarray:
        """See `Index.log_partition`."""
        queries = torch.from_numpy(self._queries(state))
        result = torch.full((len(queries),), -torch.inf)
        for vectors in map(torch.from_numpy, self._rows.parts_of(np.flatnonzero(self._allowed(view, scorable)))):
            for part in parts(np.arange(len(queries)), len(vectors)):
                result[part] = torch.logaddexp(result[part], torch.logsumexp(queries[part] @ vectors.T, dim=1))
        return result.numpy()

    def save(self, directory: Path) -> None:
        """See `Index.save`."""
        with new_directory(directory) as root:
            self.compacted()._save_into(root)

    @classmethod
    def load(cls, directory: Path, view: CatalogueView, *, content_hash: str | None = None, mmap: bool = False) -> Self:
        """See `Index.load`."""
        return cls(*cls._load_parts(directory, view, content_hash, mmap))

    def _save_into(self, root: Path) -> None:
        faiss.write_index(self._rows.main, str(root / _FLAT))
        self._save_meta(root)

    @classmethod
    def _load_parts(
        cls, directory: Path, view: CatalogueView, content_hash: str | None, mmap: bool
    ) -> tuple[Any, faiss.IndexFlatIP, IndexMeta]:
        try:
            config, meta = cls._load_meta(directory, view, content_hash)
            flat = read_index(directory / _FLAT, mmap)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ConfigError) as error:
            raise BundleError(f"{directory}: cannot read the index: {error}") from None
        if not isinstance(flat, faiss.IndexFlatIP):
            raise BundleError(f"{directory / _FLAT}: expected an IndexFlatIP, got {type(flat).__name__}")
        same(directory, "vectors", (flat.ntotal, flat.d), (meta.rows, meta.width))
        return config, flat, meta

    def _few_are_left(self, wanted: np.ndarray, candidates: int) -> np.ndarray:
        """bool ``[B]``: whether all scores and a mask cost less than a search for so many items among the main part's candidates."""
        return wanted * _EXACT_SHARE > candidates

    def _place(self) -> Placed:
        """What `search` asks for the rows of the main part, on its device."""
        return placed(self._rows.main, self.config.device)

    def _nearest(self, queries: np.ndarray, count: int, bitmap: np.ndarray | None, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Of the main part; see `Placed.search`."""
        return self._placed.search(queries, count, bitmap, share, selection)

    def _certain(self, unseen: np.ndarray, k: int, kth_score: np.ndarray, last_score: np.ndarray) -> np.ndarray:
        """bool ``[B]``: whether the main part has given all that belongs in a list.

        Args:
            unseen: int64 ``[B]``: how many rows it gave that may come back.
            k: length of the lists.
            kth_score: float32 ``[B]``, of the k-th item of the list; -inf where it has fewer.
            last_score: float32 ``[B]``, of the last row that was fetched from the main part.
        """
        return _nothing_left_out(kth_score, last_score)

    def _over_fetch(
        self, queries: np.ndarray, k: int, wanted: int, bitmap: np.ndarray | None, share: float, excluded: Excluded
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """By FAISS, so many of each part that ``wanted - k`` may be dropped: rows and scores ``[B, k]``, and which lists are certain."""
        main_scores, main_rows = self._nearest(queries, wanted + 1, bitmap, share)
        delta_scores, delta_rows = self._rows.nearest_in_delta(queries, wanted + 1, bitmap)
        main, delta = self._unseen(main_scores, main_rows, excluded), self._unseen(delta_scores, delta_rows, excluded)
        rows, scores = best(np.concatenate((main, delta), axis=1), k)
        certain = self._certain(np.count_nonzero(main, axis=1), k, scores[:, -1], main_scores[:, -1])
        return rows, scores, certain & _nothing_left_out(scores[:, -1], delta_scores[:, -1])

    def _unseen(self, scores: np.ndarray, rows: np.ndarray, excluded: Excluded) -> np.ndarray:
        """uint64 ``[B, C]``: `keys_of` what was fetched, 0 for what must not come back."""
        keys, count = keys_of(scores, rows), self.meta.rows
        found = np.arange(len(rows))[:, None] * count + rows
        keys[(rows < 0) | np.isin(found, excluded.query * count + excluded.row)] = 0
        return keys

    def _search_all(self, queries: np.ndarray, k: int, candidates: np.ndarray, excluded: Excluded) -> tuple[np.ndarray, np.ndarray]:
        """By computing the scores of all candidate rows (ascending)."""
        keys = keys_of(self._rows.products(queries, candidates), candidates)
        keys[excluded.query, np.searchsorted(candidates, excluded.row)] = 0
        return best(keys, k)

    def _queries(self, state: SlotVectors) -> np.ndarray:
        self._require(state)
        queries = matrix(state.flat(), "state")
        if queries.shape[1] != self.meta.width:
            raise ConfigError(
                f"state: {list(state.values.shape)} has {queries.shape[1]} values for each user, the index has {self.meta.width}"
            )
        return queries


def _nothing_left_out(kth_score: np.ndarray, last_score: np.ndarray) -> np.ndarray:
    """bool ``[B]``: whether no row of a part that was not fetched belongs among the k best.

    FAISS does not say which of several equal scores it returns last; where the k-th item's score equals that of the last one fetched, a
    smaller row may have been left out. Where k are not among those fetched, its score is -inf.
    """
    certain: np.ndarray = kth_score > last_score
    return certain


def _packed(mask: np.ndarray) -> np.ndarray:
    return np.packbits(mask, bitorder="little")
