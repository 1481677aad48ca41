# SPDX-License-Identifier: Apache-2.0
"""Vectors by row in two parts: a main one, which successive indexes share and nobody changes, and a small delta of the rows behind it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

# torch before FAISS, as everywhere in this project: whichever comes first owns the OpenMP settings.
import torch  # noqa: F401  # isort: skip
import faiss
import numpy as np
from pydantic import Field

from recsys.core.config import Config as BaseConfig
from recsys.retrieval.catalogue.placement import Placed, selection

_faiss: Any = faiss  # its annotations lack what its Python side adds


class Growth(BaseConfig):
    """When appended rows are merged.

    Attributes:
        delta: rows that may stand behind the main part, as a share of its own; more of them are merged with it into a new one. Every search
            compares each of them.
    """

    delta: float = Field(0.1, ge=0)


@dataclass(frozen=True, eq=False)
class VectorRows:
    """Vectors of the rows 0 to N - 1. Nothing in it ever changes.

    Attributes:
        main: those of the first rows.
        delta: those of the rest.
    """

    main: faiss.IndexFlatIP
    delta: faiss.IndexFlatIP

    @classmethod
    def of(cls, main: faiss.IndexFlatIP) -> Self:
        """All rows in the main part."""
        return cls(main, faiss.IndexFlatIP(main.d))

    @cached_property
    def main_vectors(self) -> np.ndarray:
        """float32 ``[n, D]``: FAISS's own memory, not a copy."""
        return _stored(self.main)

    @cached_property
    def delta_vectors(self) -> np.ndarray:
        """float32 ``[N - n, D]``, as `main_vectors`."""
        return _stored(self.delta)

    def appended(self, new: np.ndarray) -> Self:
        """With more rows ``[M, D]`` behind these; the delta is copied, the main part shared."""
        return type(self)(self.main, flat_index(np.concatenate((self.delta_vectors, new))))

    def merged(self) -> faiss.IndexFlatIP:
        """All rows in one FAISS index of its own memory."""
        return flat_index(np.concatenate((self.main_vectors, self.delta_vectors)))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """float32 ``[E, D]``: the vectors of rows ``[E]``."""
        late = rows >= self.main.ntotal
        found = np.empty((len(rows), self.main.d), np.float32)
        found[~late] = self.main_vectors[rows[~late]]
        found[late] = self.delta_vectors[rows[late] - self.main.ntotal]
        return found

    def parts_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of rows, ascending and distinct, in each part; a part is copied only where not all of it is wanted."""
        early, late = np.split(rows, [np.searchsorted(rows, self.main.ntotal)])
        return _chosen(self.main_vectors, early), _chosen(self.delta_vectors, late - self.main.ntotal)

    def products(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """float32 ``[B, C]``: the inner products with the vectors of rows, ascending and distinct."""
        early, late = self.parts_of(rows)
        found = np.empty((len(queries), len(rows)), np.float32)
        np.matmul(queries, early.T, out=found[:, : len(early)])
        np.matmul(queries, late.T, out=found[:, len(early) :])
        return found

    def nearest_in_delta(self, queries: np.ndarray, count: int, bitmap: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the ``count`` best in the delta: float32 and int64 ``[B, C]``, best first.

        Args:
            queries: float32 ``[B, D]``.
            count: how many rows are wanted. Where there are fewer, the last one fetched is the row -1 with the least score there is.
            bitmap: as `Placed.search` takes it, of all N rows.
        """
        first, most = self.main.ntotal, self.delta.ntotal
        if bitmap is not None:
            allowed = np.unpackbits(bitmap[first // 8 :], bitorder="little")[first % 8 :]
            bitmap = np.packbits(allowed, bitorder="little")
        scores, rows = Placed(self.delta).search(queries, min(count, most + 1), bitmap, 1.0, selection)
        return scores, np.where(rows >= 0, rows + first, -1)


def flat_index(vectors: np.ndarray) -> faiss.IndexFlatIP:
    """A FAISS index of vectors ``[n, D]``."""
    made = faiss.IndexFlatIP(vectors.shape[1])
    made.add(vectors)
    return made


def read_index(file: Path, mmap: bool) -> faiss.Index:
    """A FAISS index of whatever class. With ``mmap`` its codes and its graph are the file's own pages, where FAISS can do that."""
    return faiss.read_index(str(file), _faiss.IO_FLAG_MMAP_IFC if mmap else 0)


def _stored(index: faiss.IndexFlatIP) -> np.ndarray:
    values: Any = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d) if index.ntotal else np.zeros(0, np.float32)
    found: np.ndarray = values.reshape(index.ntotal, index.d)
    return found


def _chosen(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return vectors if len(rows) == len(vectors) else vectors[rows]
