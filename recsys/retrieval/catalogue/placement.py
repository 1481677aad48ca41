# SPDX-License-Identifier: Apache-2.0
"""Where a FAISS index is searched, and how only some of its rows come back from there.

FAISS's classic GPU indexes find at most 2,048 rows for a query, and ignore or refuse selectors (facebookresearch/faiss#3114, #3924), so
that a search there fetches more rows than are wanted and drops those that must not come back. Their memory is not for several threads.
"""

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Literal, TypeAlias

import faiss
import numpy as np

from recsys.core.errors import ConfigError

Device: TypeAlias = Literal["cpu", "cuda"]
Parameters: TypeAlias = Callable[..., Any]
"""FAISS search parameters, with a selector ``sel`` if one is given; None where nothing is to be said."""

_MOST_ON_GPU = 2048  # rows fetched and lists probed for a query
_MARGIN = 2  # times as many rows as would hold the wanted ones if those were spread evenly
_faiss: Any = faiss  # its annotations lack what its Python side adds, and what a build without CUDA has not


@dataclass(frozen=True)
class Placed:
    """A FAISS index on its device.

    Attributes:
        index: what is searched.
        selects: whether it takes selectors.
        most: how many rows it finds for a query, and how many lists it looks into.
        turn: held while it is searched.
    """

    index: Any
    selects: bool = True
    most: int = sys.maxsize
    turn: AbstractContextManager[Any] = field(default_factory=nullcontext)

    def search(
        self, queries: np.ndarray, count: int, bitmap: np.ndarray | None, share: float, parameters: Parameters
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of what was fetched, best first: float32 and int64 ``[B, C]``.

        Without selectors C may be more than ``count``, or less where the index finds no more, and fewer than ``count`` rows may be left.

        Args:
            queries: float32 ``[B, D]``.
            count: how many rows are wanted.
            bitmap: uint8, a bit for each row and maybe for more, of those that may come back, least significant bit first; None for all.
            share: of all rows, that may.
            parameters: of the search.

        Returns:
            The row -1, beside the score of what was fetched there, in the place of a row that must not come back.
        """
        if bitmap is None or self.selects:
            selector = {} if bitmap is None else {"sel": _faiss.IDSelectorBitmap(bitmap)}
            return self._fetch(queries, count, parameters(**selector))
        fetched = min(math.ceil(_MARGIN * count / share), self.index.ntotal)
        scores, rows = self._fetch(queries, fetched, parameters())
        allowed = np.unpackbits(bitmap, bitorder="little").astype(bool)
        return scores, np.where((rows >= 0) & allowed[rows], rows, -1)

    def _fetch(self, queries: np.ndarray, count: int, parameters: Any) -> tuple[np.ndarray, np.ndarray]:
        with self.turn:
            found: tuple[np.ndarray, np.ndarray] = self.index.search(queries, min(count, self.most), params=parameters)
        return found


def selection(**selector: Any) -> Any:
    """FAISS search parameters that say nothing, or which rows alone may come back."""
    return _faiss.SearchParameters(**selector) if selector else None


def placed(index: faiss.Index, device: Device) -> Placed:
    """An index on the device where it is to be searched; ``index`` itself stays where it is, to be saved and extended.

    Raises:
        ConfigError: FAISS has no such device; names ``index.device``.
    """
    if device == "cpu":
        return Placed(index)
    return Placed(_on_gpu(index), selects=False, most=_MOST_ON_GPU, turn=Lock())


def _on_gpu(index: faiss.Index) -> Any:
    """A copy of an index on the first GPU."""
    if not _faiss.get_num_gpus():
        raise ConfigError("index.device: expected 'cpu', since this FAISS has no GPU, got 'cuda'")
    return _faiss.index_cpu_to_gpu(_faiss.StandardGpuResources(), 0, index)
