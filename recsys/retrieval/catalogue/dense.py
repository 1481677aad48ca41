# SPDX-License-Identifier: Apache-2.0
"""Exact search by inner product over the concatenated slot vectors of the live items.

A set-of-tokens retriever scores an item by ``s(u, i) = Σ_k ⟨q_k(u), e_k(i)⟩``, which is one inner product of concatenated vectors
(SETRec, arXiv 2502.10833); so FAISS answers for the whole catalogue with neither beam nor trie.

The number of threads is left as the process has it: FAISS and torch share one OpenMP, and setting FAISS's would set torch's too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

# torch before FAISS, as everywhere in this project: whichever comes first owns the OpenMP settings.
import torch  # isort: skip
import faiss
import numpy as np
from torchrec.sparse.jagged_tensor import JaggedTensor

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.config import parse
from recsys.core.errors import BundleError, ConfigError, DataError
from recsys.core.files import new_directory, read_json, write_json
from recsys.retrieval.catalogue.live import CatalogueView
from recsys.retrieval.catalogue.topk import best, keys_of
from recsys.retrieval.state import SlotVectors

Exclude: TypeAlias = JaggedTensor | tuple[np.ndarray, np.ndarray]
Array: TypeAlias = np.ndarray | torch.Tensor

_FLAT, _META = "vectors.faiss", "index.json"
# Once a user's over-fetch is more than one part in this many of the items to be searched, all scores and a mask cost less.
_EXACT_SHARE = 8
_SCORES_AT_ONCE = 1 << 22


class IndexMeta(BaseConfig):
    """What an index was built from, kept beside its vectors.

    Attributes:
        accepts: the name of the user state that it searches with.
        model_hash: the retriever whose item vectors these are.
        rows: the catalogue's N.
        dim: K · d.
        catalogue_version: number of the catalogue's version; live bits may change later.
        ids_digest: the ids by row; these may not.
    """

    accepts: str
    model_hash: str
    rows: int
    dim: int
    catalogue_version: int
    ids_digest: str


@dataclass(frozen=True)
class _Excluded:
    """Pairs (query, row) that must not come back: distinct, sorted by query, then row; int64 ``[E]`` each."""

    query: np.ndarray
    row: np.ndarray

    def of(self, queries: np.ndarray, batch: int) -> "_Excluded":
        """The pairs of these queries (ascending), numbered by their places in ``queries``."""
        place = np.full(batch, -1, np.int64)
        place[queries] = np.arange(len(queries))
        chosen = place[self.query] >= 0
        return _Excluded(place[self.query[chosen]], self.row[chosen])


@register("index", "dense")
class DenseIndex:
    """Exact inner-product index over all rows of a catalogue.

    Ties are broken by row: the order is score descending, then row ascending. Scores are float32 as computed: two items whose exact
    scores differ in the last bit only may change places between batch sizes.

    Args:
        config: nothing to choose yet.
        flat: the vectors of rows 0 to N - 1. `build` makes it.
        meta: what they were built from.
    """

    accepts: ClassVar[type] = SlotVectors

    class Config(BaseConfig):
        """Configuration: the name alone."""

        name: Literal["dense"] = "dense"

    def __init__(self, config: Config, flat: faiss.IndexFlatIP, meta: IndexMeta) -> None:
        self.config = config
        self.meta = meta
        self._flat = flat
        stored = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d) if flat.ntotal else np.zeros(0, np.float32)
        self._vectors = stored.reshape(flat.ntotal, flat.d)  # FAISS's own memory, not a copy

    @classmethod
    def build(cls, config: Config, vectors: Array, view: CatalogueView, *, model_hash: str) -> "DenseIndex":
        """An index over item vectors.

        Args:
            config: the index's configuration.
            vectors: float ``[N, K * d]``, as `Retriever.item_vectors` returns; kept as float32.
            view: the catalogue whose rows they are.
            model_hash: names the retriever that made them.

        Raises:
            DataError: the vectors are not a finite matrix with one row for each of the catalogue's.
        """
        matrix = _matrix(vectors, "vectors")
        if len(matrix) != view.count:
            raise DataError(f"vectors: expected one for each of the catalogue's {view.count} rows, got {len(matrix)}")
        flat = faiss.IndexFlatIP(matrix.shape[1])
        flat.add(matrix)
        meta = IndexMeta(
            accepts=cls.accepts.__name__,
            model_hash=model_hash,
            rows=view.count,
            dim=flat.d,
            catalogue_version=view.version.number,
            ids_digest=view.ids_digest,
        )
        return cls(config, flat, meta)

    def search(
        self, state: SlotVectors, k: int, view: CatalogueView, exclude: Exclude | None = None, scorable: Array | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best live items of each user, without those to be excluded.

        Args:
            state: B users, ``[B, K, d]``.
            k: length of the lists, at least 1.
            view: the catalogue; only its live rows come back.
            exclude: rows not wanted for each user: a jagged tensor, or ``(values [E], offsets [B + 1])``. Repeats are harmless; -1
                (an unknown item) excludes nothing.
            scorable: bool ``[N]``: rows that the model can score at all, such as those of items that it was trained on; default all.

        Returns:
            ``(rows int64 [B, k], scores float32 [B, k])``, best first. Wherever k such items exist, k come back; otherwise the rest is
            filled with row -1 and score -inf.

        Raises:
            ConfigError: the state is not `SlotVectors`, or its width is not the vectors'.
            BundleError: the view is not of the catalogue that the index was built for.
            DataError: k, ``exclude`` or ``scorable`` is malformed, or the state is not finite.
        """
        if k < 1:
            raise DataError(f"k: expected at least 1, got {k}")
        queries = self._queries(state)
        allowed = self._allowed(view, scorable)
        candidates = np.flatnonzero(allowed)
        excluded = self._excluded(exclude, len(queries), allowed)
        wanted = k + np.bincount(excluded.query, minlength=len(queries))

        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        exact = wanted * _EXACT_SHARE > len(candidates)
        few = np.flatnonzero(~exact)
        if len(few):
            params = None if len(candidates) == view.count else _only(view.bitmap if scorable is None else _packed(allowed))
            rows[few], scores[few], certain = self._search_flat(
                queries[few], k, int(wanted[few].max()), params, excluded.of(few, len(queries))
            )
            exact[few] = ~certain
        for part in _parts(np.flatnonzero(exact), len(candidates)):
            rows[part], scores[part] = self._search_all(queries[part], k, candidates, excluded.of(part, len(queries)))
        return rows, scores

    def score(self, state: SlotVectors, rows: np.ndarray) -> np.ndarray:
        """float32 ``[B, C]``: the scores of given catalogue rows ``[B, C]``, live or not; -inf for the row -1.

        Raises:
            ConfigError: as for `search`.
            DataError: there are not as many lists as users, or a row is not one of the catalogue's.
        """
        queries = self._queries(state)
        rows = np.asarray(rows, np.int64)
        if rows.ndim != 2 or len(rows) != len(queries):
            raise DataError(f"rows: expected shape [{len(queries)}, C], got {list(rows.shape)}")
        self._check_rows("rows", rows)
        scores = np.full(rows.shape, -np.inf, np.float32)
        users, places = np.nonzero(rows >= 0)
        for part in _parts(np.arange(len(users)), self.meta.dim):
            user, place = users[part], places[part]
            scores[user, place] = np.einsum("ed,ed->e", self._vectors[rows[user, place]], queries[user])
        return scores

    def log_partition(self, state: SlotVectors, view: CatalogueView, scorable: Array | None = None) -> np.ndarray:
        """float32 ``[B]``: ``log Σ_i exp s(u, i)`` over the live (and scorable) items; -inf where there is none.

        A score less this is the log-probability of an item under the softmax that retrievers are trained with. Errors as for `search`.
        """
        queries = torch.from_numpy(self._queries(state))
        vectors = torch.from_numpy(self._of(np.flatnonzero(self._allowed(view, scorable))))
        result = torch.empty(len(queries))
        for part in _parts(np.arange(len(queries)), len(vectors)):
            result[part] = torch.logsumexp(queries[part] @ vectors.T, dim=1)
        return result.numpy()

    def save(self, directory: Path) -> None:
        """Write ``directory``, whole or not at all.

        Raises:
            FileExistsError: it is there already.
        """
        with new_directory(directory) as root:
            faiss.write_index(self._flat, str(root / _FLAT))
            write_json(root / _META, {"config": self.config.model_dump(mode="json"), "meta": self.meta.model_dump(mode="json")})

    @classmethod
    def load(cls, directory: Path, view: CatalogueView, *, dim: int | None = None, model_hash: str | None = None) -> "DenseIndex":
        """Read what `save` wrote, and hold that it fits.

        Args:
            directory: the index's directory.
            view: the catalogue that it is to be searched with. Its live bits may have changed since, its rows not.
            dim: the retriever's K · d, where it is to be compared.
            model_hash: the retriever, where it is to be compared.

        Raises:
            BundleError: files are absent or broken, or belong to another state, retriever or catalogue; names both sides.
        """
        try:
            stored = read_json(directory / _META)
            config = parse(cls.Config, stored["config"], source=str(directory / _META))
            meta = parse(IndexMeta, stored["meta"], source=str(directory / _META))
            flat = faiss.read_index(str(directory / _FLAT))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ConfigError) as error:
            raise BundleError(f"{directory}: cannot read the index: {error}") from None
        if not isinstance(flat, faiss.IndexFlatIP):
            raise BundleError(f"{directory / _FLAT}: expected an IndexFlatIP, got {type(flat).__name__}")
        _same(directory, "user state", meta.accepts, cls.accepts.__name__)
        _same(directory, "vectors", (flat.ntotal, flat.d), (meta.rows, meta.dim))
        _same(directory, "dimension", meta.dim, meta.dim if dim is None else dim)
        _same(directory, "model", meta.model_hash, meta.model_hash if model_hash is None else model_hash)
        index = cls(config, flat, meta)
        index._check_view(view, str(directory))
        return index

    def _search_flat(
        self, queries: np.ndarray, k: int, wanted: int, params: Any, excluded: _Excluded
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """By FAISS, over-fetching so that ``wanted - k`` items may be dropped.

        Returns:
            rows and scores ``[B, k]``, and bool ``[B]``: whether they are certain. FAISS does not say which of several equal scores it
            returns last; where the k-th item's score equals that of the last one fetched, a smaller row may have been left out.
        """
        scores, rows = self._flat.search(queries, wanted + 1, params=params)
        keys = keys_of(scores, rows)
        count = self.meta.rows
        found = np.arange(len(queries))[:, None] * count + rows
        keys[np.isin(found, excluded.query * count + excluded.row)] = 0
        best_rows, best_scores = best(keys, k)
        certain: np.ndarray = best_scores[:, -1] > scores[:, -1]
        return best_rows, best_scores, certain

    def _search_all(self, queries: np.ndarray, k: int, candidates: np.ndarray, excluded: _Excluded) -> tuple[np.ndarray, np.ndarray]:
        """By computing the scores of all candidate rows (ascending)."""
        keys = keys_of(queries @ self._of(candidates).T, candidates)
        keys[excluded.query, np.searchsorted(candidates, excluded.row)] = 0
        return best(keys, k)

    def _of(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of these rows, ascending and distinct."""
        return self._vectors if len(rows) == len(self._vectors) else self._vectors[rows]

    def _queries(self, state: SlotVectors) -> np.ndarray:
        if not isinstance(state, self.accepts):
            raise ConfigError(f"index 'dense' accepts {self.accepts.__name__}, got {type(state).__name__}")
        queries = _matrix(state.flat(), "state")
        if queries.shape[1] != self.meta.dim:
            raise ConfigError(
                f"state: {list(state.values.shape)} has {queries.shape[1]} values for each user, the index has {self.meta.dim}"
            )
        return queries

    def _allowed(self, view: CatalogueView, scorable: Array | None) -> np.ndarray:
        self._check_view(view, "index 'dense'")
        if scorable is None:
            return view.live
        mask = _host(scorable)
        if mask.shape != view.live.shape or mask.dtype != np.bool_:
            raise DataError(f"scorable: expected bool [{view.count}], got {mask.dtype} {list(mask.shape)}")
        allowed: np.ndarray = view.live & mask
        return allowed

    def _excluded(self, exclude: Exclude | None, batch: int, allowed: np.ndarray) -> _Excluded:
        """The distinct pairs to exclude, without those that cannot come back anyway."""
        if exclude is None:
            return _Excluded(np.zeros(0, np.int64), np.zeros(0, np.int64))
        values, offsets = (exclude.values(), exclude.offsets()) if isinstance(exclude, JaggedTensor) else exclude
        values, offsets = _host(values).astype(np.int64), _host(offsets).astype(np.int64)
        lengths = np.diff(offsets)
        if len(offsets) != batch + 1 or offsets[0] != 0 or offsets[-1] != len(values) or (lengths < 0).any():
            raise DataError(f"exclude: expected {batch + 1} ascending offsets from 0 to {len(values)}, got {offsets[:3]}...{offsets[-1:]}")
        self._check_rows("exclude", values)
        query = np.repeat(np.arange(batch), lengths)
        kept = values >= 0
        kept[kept] = allowed[values[kept]]
        pairs = np.unique(query[kept] * len(allowed) + values[kept])
        return _Excluded(pairs // max(len(allowed), 1), pairs % max(len(allowed), 1))

    def _check_rows(self, name: str, rows: np.ndarray) -> None:
        wrong = (rows < -1) | (rows >= self.meta.rows)
        if wrong.any():
            raise DataError(f"{name}: {rows[wrong][0]} is not a catalogue row: expected -1 to {self.meta.rows - 1}")

    def _check_view(self, view: CatalogueView, where: str) -> None:
        if view.count != self.meta.rows:
            raise BundleError(f"{where}: built for {self.meta.rows} catalogue rows, but the catalogue has {view.count}: build it anew")
        _same(where, "catalogue ids", self.meta.ids_digest, view.ids_digest)


def _same(where: object, what: str, got: object, expected: object) -> None:
    if got != expected:
        raise BundleError(f"{where}: {what}: the index has {got}, expected {expected}")


def _only(bitmap: np.ndarray) -> Any:
    """FAISS search parameters that let only the rows of a bitmap come back."""
    return faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bitmap))  # type: ignore[call-arg, arg-type]


def _packed(mask: np.ndarray) -> np.ndarray:
    return np.packbits(mask, bitorder="little")


def _host(values: Array) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _matrix(values: Array, name: str) -> np.ndarray:
    """A finite float32 C-contiguous matrix on the host."""
    matrix = np.ascontiguousarray(_host(values.float() if isinstance(values, torch.Tensor) else values), np.float32)
    if matrix.ndim != 2:
        raise DataError(f"{name}: expected 2 dimensions, got shape {list(matrix.shape)}")
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        raise DataError(f"{name}: row {int(np.argmin(finite))} is not finite")
    return matrix


def _parts(indices: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """Cut ``indices`` so that ``len(part) * width`` stays bounded."""
    size = max(1, _SCORES_AT_ONCE // max(width, 1))
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
