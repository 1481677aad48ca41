# SPDX-License-Identifier: Apache-2.0
"""Search by inner product without comparing every item: inverted lists, and a graph of neighbours, both by FAISS.

What they find of a catalogue of which few items are live falls apart (34% of the places of a list were empty in a graph with one live
item in a hundred), so below a share the live items are compared one by one, above it the effort grows as the share falls, and a list that
is short for want of effort is made anew by the exact search.
"""

from abc import abstractmethod
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import faiss
import numpy as np
from pydantic import Field

from recsys.core.components import register
from recsys.core.errors import BundleError, DataError
from recsys.retrieval.catalogue.dense import DenseIndex
from recsys.retrieval.catalogue.index import IndexMeta, same
from recsys.retrieval.catalogue.live import CatalogueView
from recsys.retrieval.catalogue.placement import Device, Parameters, Placed, placed, selection
from recsys.retrieval.catalogue.vector_rows import Growth, read_index
from recsys.retrieval.state import SlotVectors

_STRUCTURE = "structure.faiss"
_faiss: Any = faiss  # its annotations lack what its Python side adds


class Effort(Growth):
    """When to search approximately, and how hard; and how it grows (`Growth`).

    Attributes:
        exact_below: share of live (and scorable) rows among the main part's below which all are compared.
        effort: what grows with the recall and with the time of a search: lists probed, or candidates kept. At a share s of live rows,
            effort / s. `ApproximateIndex.calibrated` chooses it.
    """

    exact_below: float = Field(0.05, ge=0, le=1)
    effort: int = Field(16, ge=1)


class ApproximateIndex(DenseIndex):
    """A `DenseIndex` whose longer searches go through a FAISS structure over the same vectors, which it holds beside them.

    Scores are exact; a list may miss items of the main part, none of the delta, of which the structure knows nothing. k live unseen items
    come back wherever they exist, as from every index. `compacted` makes the whole structure anew, and so does `save` where there is a
    delta.

    Args:
        config: see `Effort`.
        flat: the vectors of rows 0 to N - 1.
        meta: what they were built from.
        structure: over the same vectors; made anew if None.
    """

    Config: ClassVar[type[Any]] = Effort
    structure: ClassVar[type]

    def __init__(self, config: Any, flat: faiss.IndexFlatIP, meta: IndexMeta, structure: faiss.Index | None = None) -> None:
        self._structure: Any = structure
        super().__init__(config, flat, meta)

    def _place(self) -> Placed:
        self._structure = self._structure or self._make()
        return placed(self._structure, self.config.device)

    @abstractmethod
    def _make(self) -> Any:
        """The structure over the vectors of the main part."""

    @abstractmethod
    def _parameters(self, effort: int, **selector: Any) -> Any:
        """FAISS search parameters."""

    def calibrated(self, states: SlotVectors, view: CatalogueView, recall: float = 0.99, k: int = 100, seed: int = 0) -> Self:
        """The same index with the smallest power of two of an effort that has a recall on the states of some users, such as of validation.

        It must have it on the main part, where all items are live, as well as where they are so few, drawn by lot, that fewer would be
        compared one by one. It is chosen on the host, whatever the device: a search there finds the same items, since it leaves lists that
        it cannot fill to the exact one.

        Args:
            states: of users.
            view: the catalogue.
            recall: wanted share of the exact lists, on average.
            k: length of the lists.
            seed: of the lot.

        Raises:
            DataError: there is no user.
        """
        queries = self._queries(states)
        if not len(queries):
            raise DataError("states: expected at least one user to choose the effort by, got none")
        self._allowed(view, None)
        count = self._rows.main.ntotal
        if not count:
            return self
        few = np.random.default_rng(seed).random(count) < max(self.config.exact_below, k / count)
        cases = [(None, 1.0), (np.packbits(few, bitorder="little"), float(few.mean()))]
        flat, structure = Placed(self._rows.main), Placed(self._structure)
        exact = [flat.search(queries, k, *case, selection)[1] for case in cases]
        effort = 1
        while True:
            index = self._with(effort)
            found = [structure.search(queries, k, *case, index._probing(case[1]))[1] for case in cases]
            if effort >= count or min(map(recall_of, found, exact)) >= recall:
                return index
            effort *= 2

    @classmethod
    def load(cls, directory: Path, view: CatalogueView, *, content_hash: str | None = None, mmap: bool = False) -> Self:
        """See `Index.load`."""
        config, flat, meta = cls._load_parts(directory, view, content_hash, mmap)
        try:
            structure = read_index(directory / _STRUCTURE, mmap)
        except RuntimeError as error:
            raise BundleError(f"{directory}: cannot read the index: {error}") from None
        if not isinstance(structure, cls.structure):
            raise BundleError(f"{directory / _STRUCTURE}: expected an {cls.structure.__name__}, got {type(structure).__name__}")
        same(directory, _STRUCTURE, (structure.ntotal, structure.d), (meta.rows, meta.width))
        return cls(config, flat, meta, structure)

    def _save_into(self, root: Path) -> None:
        super()._save_into(root)
        faiss.write_index(self._structure, str(root / _STRUCTURE))

    def _with(self, effort: int) -> Self:
        index = copy(self)
        index.config = self.config.model_copy(update={"effort": effort})
        return index

    def _probing(self, share: float) -> Parameters:
        """The parameters of a search with the effort that this share of rows takes."""
        return partial(self._parameters, min(int(np.ceil(self.config.effort / max(share, 1e-9))), self._rows.main.ntotal))

    def _few_are_left(self, wanted: np.ndarray, candidates: int) -> np.ndarray:
        too_few = candidates < self.config.exact_below * self._rows.main.ntotal
        return np.full(len(wanted), True) if too_few else super()._few_are_left(wanted, candidates)

    def _nearest(self, queries: np.ndarray, count: int, bitmap: np.ndarray | None, share: float) -> tuple[np.ndarray, np.ndarray]:
        return self._placed.search(queries, count, bitmap, share, self._probing(share))

    def _certain(self, unseen: np.ndarray, k: int, kth_score: np.ndarray, last_score: np.ndarray) -> np.ndarray:
        return np.asarray(unseen >= k)


@register("index", "ivf")
class IVFIndex(ApproximateIndex):
    """Items in lists by the centroid that their vector is most like; a search looks into the lists of the best centroids."""

    class Config(Effort):
        """Besides the `Effort`, which is the number of lists probed.

        Attributes:
            lists: how many; null for four times the square root of the number of items.
            seed: of the centroids.
            device: ``cuda`` for FAISS on the first GPU; what is exact stays on the host.
        """

        name: Literal["ivf"] = "ivf"
        device: Device = "cpu"
        lists: int | None = Field(None, ge=1)
        seed: int = 0

    accepts: ClassVar[tuple[type, ...]] = (SlotVectors,)
    structure: ClassVar[type] = faiss.IndexIVFFlat

    def _make(self) -> Any:
        lists = min(self.config.lists or max(1, int(4 * self.meta.rows**0.5)), max(self.meta.rows, 1))
        made = _faiss.IndexIVFFlat(faiss.IndexFlatIP(self.meta.width), self.meta.width, lists, faiss.METRIC_INNER_PRODUCT)
        made.cp.seed = self.config.seed
        made.cp.min_points_per_centroid = 1
        if self.meta.rows:
            made.train(self._rows.main_vectors)
            made.add(self._rows.main_vectors)
        return made

    def _parameters(self, effort: int, **selector: Any) -> Any:
        return _faiss.SearchParametersIVF(nprobe=min(effort, self._structure.nlist, self._placed.most), **selector)


@register("index", "hnsw")
class HNSWIndex(ApproximateIndex):
    """A navigable graph over the items; a search walks from neighbour to neighbour and keeps the best candidates."""

    class Config(Effort):
        """Besides the `Effort`, which is the number of candidates kept (at least the length of the list).

        Attributes:
            exact_below: higher than elsewhere, since a walk through a graph of dead items is long.
            neighbours: of an item in the graph.
            construction: candidates kept while it is built.
            device: FAISS has no such graph on a GPU.
        """

        name: Literal["hnsw"] = "hnsw"
        device: Literal["cpu"] = "cpu"
        exact_below: float = Field(0.2, ge=0, le=1)
        effort: int = Field(64, ge=1)
        neighbours: int = Field(32, ge=2)
        construction: int = Field(128, ge=1)

    accepts: ClassVar[tuple[type, ...]] = (SlotVectors,)
    structure: ClassVar[type] = faiss.IndexHNSWFlat

    def _make(self) -> Any:
        made = _faiss.IndexHNSWFlat(self.meta.width, self.config.neighbours, faiss.METRIC_INNER_PRODUCT)
        made.hnsw.efConstruction = self.config.construction
        if self.meta.rows:
            made.add(self._rows.main_vectors)
        return made

    def _parameters(self, effort: int, **selector: Any) -> Any:
        return _faiss.SearchParametersHNSW(efSearch=effort, **selector)


def recall_of(found_bk: np.ndarray, exact_bk: np.ndarray) -> float:
    """The mean share of exact lists that was found; places without an item (-1) do not count."""
    shares = []
    for found, exact in zip(found_bk, exact_bk, strict=True):
        wanted = exact[exact >= 0]
        shares.append(np.isin(wanted, found).mean() if len(wanted) else 1.0)
    return float(np.mean(shares))
