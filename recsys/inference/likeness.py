# SPDX-License-Identifier: Apache-2.0
"""How alike items are, by what the retriever has of them, and what is written of them in the bundle."""

from collections.abc import Hashable
from functools import cached_property

import numpy as np
import torch

from recsys.bundle.bundle import Bundle
from recsys.core.errors import ConfigError, unknown
from recsys.inference.request import InvalidRequest
from recsys.retrieval.base import VectorRetriever
from recsys.retrieval.catalogue.live import CatalogueView

_ROWS_AT_ONCE = 8192


class Likeness:
    """The items of a bundle, compared.

    Args:
        bundle: whose retriever and items these are.
        view: of its catalogue.
    """

    def __init__(self, bundle: Bundle, view: CatalogueView) -> None:
        self._bundle, self._view = bundle, view
        self._scorable = bundle.retriever.scorable.numpy()

    @cached_property
    def vectors(self) -> np.ndarray:
        """float32 ``[N, D]`` by catalogue row, of length 1 (0 where the model does not know the item); computed once, when asked for.

        They are the item vectors of a retriever that has some, else what the model reads of an item's codes.

        Raises:
            InvalidRequest: the model has no vectors of items.
        """
        with torch.inference_mode():
            found = np.array(self._all(), np.float32)
        norms = np.linalg.norm(found, axis=1, keepdims=True)
        found /= np.where(norms > 0, norms, 1.0)
        found[~self._scorable] = 0.0
        return found

    def similar(self, item_id: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` live items most like one that may not be live itself, without it: catalogue rows and cosines, the best first.

        Raises:
            InvalidRequest: the item is not in the catalogue, or the model does not know it.
        """
        (row,) = self._view.rows([item_id])
        if row < 0:
            raise InvalidRequest(f"item_id: {item_id!r} is not in the catalogue")
        if not self._scorable[row]:
            raise InvalidRequest(f"item_id: {item_id!r} is newer than the model, which cannot compare it")
        allowed = self._view.live & self._scorable
        allowed[row] = False
        rows = np.flatnonzero(allowed)
        cosine = self.vectors[rows] @ self.vectors[row]
        order = np.lexsort((rows, -cosine))[:k]
        return rows[order], np.clip(cosine[order], -1.0, 1.0)

    def values(self, attribute: str, rows: np.ndarray) -> list[tuple[Hashable, ...]]:
        """The values of an attribute of items, by catalogue row; none where it is null.

        Raises:
            InvalidRequest: the items have no such attribute.
        """
        items = self._bundle.items
        if attribute not in items.column_names:
            raise InvalidRequest(f"quotas: {unknown('item attribute', attribute, items.column_names)}")
        places = self._place[rows]
        column = items.column(attribute).take(np.maximum(places, 0)).to_pylist()
        return [_several(value) if place >= 0 else () for place, value in zip(places.tolist(), column, strict=True)]

    @cached_property
    def _place(self) -> np.ndarray:
        """int64 ``[N]``: where in the table of items each catalogue row stands; -1 where it does not."""
        rows = self._view.rows(self._bundle.items.column("item_id"))
        place = np.full(self._view.count, -1, np.int64)
        place[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
        return place

    def _all(self) -> np.ndarray:
        retriever = self._bundle.retriever
        if isinstance(retriever, VectorRetriever):
            return retriever.item_vectors().float().numpy()
        try:
            parts = torch.arange(self._view.count).split(_ROWS_AT_ONCE)
            return np.concatenate([retriever.event_vectors(rows).float().numpy() for rows in parts])
        except ConfigError:
            raise InvalidRequest(f"the model, {type(retriever).__name__}, has no vectors of items to compare them by") from None


def _several(value: object) -> tuple[Hashable, ...]:
    if value is None:
        return ()
    return tuple(each for each in value if each is not None) if isinstance(value, list) else (value,)  # type: ignore[return-value]
