# SPDX-License-Identifier: Apache-2.0
"""Exact search by inner product over the concatenated slot vectors of the live items.

A set-of-tokens retriever scores an item by ``s(u, i) = Σ_k ⟨q_k(u), e_k(i)⟩``, which is one inner product of concatenated vectors
(SETRec, arXiv 2502.10833); so FAISS answers for the whole catalogue with neither beam nor trie.

The number of threads is left as the process has it: FAISS and torch share one OpenMP, and setting FAISS's would set torch's too.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

# torch before FAISS, as everywhere in this project: whichever comes first owns the OpenMP settings.
import torch  # isort: skip
import faiss
import numpy as np

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import BundleError, ConfigError, DataError
from recsys.core.files import new_directory
from recsys.retrieval.base import Retriever, VectorRetriever
from recsys.retrieval.catalogue.index import Array, Exclude, Excluded, Index, IndexMeta, check_k, matrix, parts, same
from recsys.retrieval.catalogue.live import CatalogueView
from recsys.retrieval.catalogue.placement import Device, Placed, placed
from recsys.retrieval.catalogue.topk import best, keys_of
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

    class Config(BaseConfig):
        """Where it is searched.

        Attributes:
            device: ``cuda`` for FAISS on the first GPU. Vectors stay on the host as well, where it is saved from and where short and
                hard cases are compared.
        """

        name: Literal["dense"] = "dense"
        device: Device = "cpu"

    config: Any

    def __init__(self, config: Any, flat: faiss.IndexFlatIP, meta: IndexMeta) -> None:
        super().__init__(config, meta)
        self._flat = flat
        stored = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d) if flat.ntotal else np.zeros(0, np.float32)
        self._vectors = stored.reshape(flat.ntotal, flat.d)  # FAISS's own memory, not a copy
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
        flat = faiss.IndexFlatIP(rows.shape[1])
        flat.add(rows)
        return cls(config, flat, cls._meta(view, content_hash, flat.d))

    def extended(self, vectors: Array, view: CatalogueView) -> Self:
        """An index with the rows that were appended since; the present one stays as it is, for those who read it.

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
        return self.build(cast(Any, self.config), np.concatenate((self._vectors, new)), view, content_hash=self.meta.content_hash)

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
        exact = self._few_are_left(wanted, len(candidates))
        few = np.flatnonzero(~exact)
        if len(few):
            bitmap = None if len(candidates) == view.count else view.bitmap if scorable is None else _packed(allowed)
            share = len(candidates) / max(view.count, 1)
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
            scores[user, place] = np.einsum("ed,ed->e", self._vectors[rows[user, place]], queries[user])
        return scores

    def log_partition(self, state: SlotVectors, view: CatalogueView, scorable: Array | None = None) -> np.ndarray:
        """See `Index.log_partition`."""
        queries = torch.from_numpy(self._queries(state))
        vectors = torch.from_numpy(self._of(np.flatnonzero(self._allowed(view, scorable))))
        result = torch.empty(len(queries))
        for part in parts(np.arange(len(queries)), len(vectors)):
            result[part] = torch.logsumexp(queries[part] @ vectors.T, dim=1)
        return result.numpy()

    def save(self, directory: Path) -> None:
        """See `Index.save`."""
        with new_directory(directory) as root:
            self._save_into(root)

    @classmethod
    def load(cls, directory: Path, view: CatalogueView, *, content_hash: str | None = None) -> Self:
        """See `Index.load`."""
        return cls(*cls._load_parts(directory, view, content_hash))

    def _save_into(self, root: Path) -> None:
        faiss.write_index(self._flat, str(root / _FLAT))
        self._save_meta(root)

    @classmethod
    def _load_parts(cls, directory: Path, view: CatalogueView, content_hash: str | None) -> tuple[Any, faiss.IndexFlatIP, IndexMeta]:
        try:
            config, meta = cls._load_meta(directory, view, content_hash)
            flat = faiss.read_index(str(directory / _FLAT))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ConfigError) as error:
            raise BundleError(f"{directory}: cannot read the index: {error}") from None
        if not isinstance(flat, faiss.IndexFlatIP):
            raise BundleError(f"{directory / _FLAT}: expected an IndexFlatIP, got {type(flat).__name__}")
        same(directory, "vectors", (flat.ntotal, flat.d), (meta.rows, meta.width))
        return config, flat, meta

    def _few_are_left(self, wanted: np.ndarray, candidates: int) -> np.ndarray:
        """bool ``[B]``: whether all scores and a mask cost less than a search for so many items."""
        return wanted * _EXACT_SHARE > candidates

    def _place(self) -> Placed:
        """What `search` asks, on its device."""
        return placed(self._flat, self.config.device)

    def _nearest(self, queries: np.ndarray, count: int, bitmap: np.ndarray | None, share: float) -> tuple[np.ndarray, np.ndarray]:
        """See `Placed.search`."""
        return self._placed.search(queries, count, bitmap, share, selection)

    def _certain(self, kth_score: np.ndarray, kth_row: np.ndarray, last_score: np.ndarray) -> np.ndarray:
        """bool ``[B]``: whether a list is what `search` promises.

        FAISS does not say which of several equal scores it returns last; where the k-th item's score equals that of the last one
        fetched, a smaller row may have been left out. Where k are not among those fetched, its score is -inf.
        """
        certain: np.ndarray = kth_score > last_score
        return certain

    def _over_fetch(
        self, queries: np.ndarray, k: int, wanted: int, bitmap: np.ndarray | None, share: float, excluded: Excluded
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """By FAISS, so many that ``wanted - k`` items may be dropped: rows and scores ``[B, k]``, and `_certain`."""
        scores, rows = self._nearest(queries, wanted + 1, bitmap, share)
        keys = keys_of(scores, rows)
        count = self.meta.rows
        found = np.arange(len(queries))[:, None] * count + rows
        keys[(rows < 0) | np.isin(found, excluded.query * count + excluded.row)] = 0
        best_rows, best_scores = best(keys, k)
        return best_rows, best_scores, self._certain(best_scores[:, -1], best_rows[:, -1], scores[:, -1])

    def _search_all(self, queries: np.ndarray, k: int, candidates: np.ndarray, excluded: Excluded) -> tuple[np.ndarray, np.ndarray]:
        """By computing the scores of all candidate rows (ascending)."""
        keys = keys_of(queries @ self._of(candidates).T, candidates)
        keys[excluded.query, np.searchsorted(candidates, excluded.row)] = 0
        return best(keys, k)

    def _of(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of these rows, ascending and distinct."""
        return self._vectors if len(rows) == len(self._vectors) else self._vectors[rows]

    def _queries(self, state: SlotVectors) -> np.ndarray:
        self._require(state)
        queries = matrix(state.flat(), "state")
        if queries.shape[1] != self.meta.width:
            raise ConfigError(
                f"state: {list(state.values.shape)} has {queries.shape[1]} values for each user, the index has {self.meta.width}"
            )
        return queries


def selection(**selector: Any) -> Any:
    """FAISS search parameters that say nothing, or which rows alone may come back."""
    return cast(Any, faiss).SearchParameters(**selector) if selector else None


def _packed(mask: np.ndarray) -> np.ndarray:
    return np.packbits(mask, bitorder="little")
