# SPDX-License-Identifier: Apache-2.0
"""A bundle whose catalogue has items that came after it: they are encoded as its own were, and everything else stays as it is."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recsys.bundle.bundle import Bundle
from recsys.core import components
from recsys.core.config import parse
from recsys.core.errors import BundleError, CannotScoreNewItems, ConfigError, DataError, unknown
from recsys.core.schema import ITEM
from recsys.retrieval.base import CodeRetriever, Retriever, VectorRetriever
from recsys.retrieval.catalogue import CatalogueView, CodeIndex, DenseIndex, Index
from recsys.retrieval.codes import extend
from recsys.retrieval.items import ItemTable
from recsys.text import ItemText, ItemVectors, TextEncoder, item_text

_COMPARED, _TOLERANCE = 4, 1e-3


@dataclass(frozen=True)
class Prepared:
    """Everything of a longer catalogue that may fail to be made, before anything is changed.

    Attributes:
        new: display attributes of the new items.
        items: what the retriever is told of all items.
        retriever: over all of them; it shares its weights with the bundle's.
        vectors: float ``[M, D]`` of the new items, for an index over vectors; else None.
    """

    new: pa.Table
    items: ItemTable
    retriever: Retriever
    vectors: Tensor | None


class Grower:
    """Encodes items that came after a bundle. What it learns of a bundle holds for what is grown from it.

    Args:
        bundle: whose recipe names the text encoder.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def table(self, items: Sequence[Mapping[str, Any]]) -> pa.Table:
        """The items as rows of the bundle's table of display attributes; what is not given is null.

        Raises:
            DataError: an item has no id, an attribute that the table has not, or a value of another type.
        """
        schema = self._bundle.items.schema
        for item in items:
            if not isinstance(item.get(ITEM), str) or not item[ITEM]:
                raise DataError(f"{ITEM}: expected a non-empty string, got {item.get(ITEM)!r}")
            for name in item:
                if name not in schema.names:
                    raise DataError(f"item {item[ITEM]!r}: {unknown('attribute', name, schema.names)}")
        return pa.table([_column(field, [item.get(field.name) for item in items]) for field in schema], schema=schema)

    def prepare(self, bundle: Bundle, new: pa.Table) -> Prepared:
        """Encode new items; changes nothing.

        Args:
            bundle: the one that this was made for, or one that it has grown.
            new: see `table`; none of its ids is in the bundle's catalogue.

        Raises:
            CannotScoreNewItems: the retriever is bound to the items of its training.
            ConfigError: the bundle does not say how texts are encoded.
            BundleError: texts are encoded otherwise here than they were for the bundle.
            DataError: the tokenizer has no codes left for an item; or the index takes no more rows.
        """
        _require_growing(bundle)
        items = self._items(bundle.item_table, new)
        if items.codes is not None and bundle.tokenizer is not None:
            items = replace(items, codes=extend(items.codes, bundle.tokenizer, items))
        retriever = _with_items(bundle.retriever, items)
        vectors = None
        if isinstance(retriever, VectorRetriever):
            with torch.no_grad():
                vectors = retriever.item_vectors()[bundle.item_table.count :]
        return Prepared(new, items, retriever, vectors)

    def grow(self, bundle: Bundle, prepared: Prepared) -> Bundle:
        """The bundle with the new items in its catalogue, live; its views, and whoever reads them, stay as they are."""
        bundle.catalogue.add(prepared.new.column(ITEM))
        return replace(
            bundle,
            items=pa.concat_tables([bundle.items, prepared.new]),
            item_table=prepared.items,
            retriever=prepared.retriever,
            index=_extended(bundle.index, prepared, bundle.catalogue.snapshot()),
        )

    def _items(self, present: ItemTable, new: pa.Table) -> ItemTable:
        """What the retriever is told: nobody has met the new ones yet, so they are not warm and have no collaborative vector."""
        count = new.num_rows
        collaborative = present.collaborative
        unmet = None if collaborative is None else torch.cat((collaborative, collaborative.new_zeros(count, collaborative.shape[1])))
        return ItemTable(
            count=present.count + count,
            warm=torch.cat((present.warm, torch.zeros(count, dtype=present.warm.dtype))),
            text=None if present.text is None else torch.cat((present.text, self._text(new).to(present.text))),
            collaborative=unmet,
            codes=present.codes,
        )

    def _text(self, items: pa.Table) -> Tensor:
        """float32 ``[M, D]``."""
        encoder, columns = self._encoder
        return torch.from_numpy(_encoded(encoder, items, columns))

    @cached_property
    def _encoder(self) -> tuple[TextEncoder | ItemVectors, tuple[str, ...]]:
        """The text encoder of the bundle's recipe, which gives here what it gave then; and the columns that it reads."""
        manifest, text = self._bundle.manifest, self._bundle.item_table.text
        if "text" not in manifest.recipe:
            raise ConfigError(f"bundle {manifest.sha256}: its recipe has no section 'text', so new items cannot be encoded")
        described = parse(ItemText, manifest.recipe["text"], source="manifest.json: recipe: text")
        encoder: TextEncoder | ItemVectors = components.build("text_encoder", described.encoder)
        known = self._bundle.items.slice(0, _COMPARED)
        if text is not None and not np.allclose(_encoded(encoder, known, described.columns), text[:_COMPARED].numpy(), atol=_TOLERANCE):
            raise BundleError(f"bundle {manifest.sha256}: text encoder {encoder.identity!r} gives other vectors here than it gave then")
        return encoder, described.columns


def _require_growing(bundle: Bundle) -> None:
    if type(bundle.retriever).replace_items is Retriever.replace_items:
        bundle.retriever.replace_items(bundle.item_table)
    if not isinstance(bundle.index, DenseIndex | CodeIndex):
        raise CannotScoreNewItems(f"index {type(bundle.index).__name__} takes no new items")


def _with_items(retriever: Retriever, items: ItemTable) -> Retriever:
    """A retriever over other items that shares its weights with the given one, which stays as it is for those who ask it."""
    shared = {id(tensor): tensor for tensor in (*retriever.parameters(), *retriever.buffers())}
    twin = copy.deepcopy(retriever, shared)
    twin.replace_items(items)
    return twin


def _extended(index: Index, prepared: Prepared, view: CatalogueView) -> Index:
    if isinstance(index, DenseIndex):
        assert prepared.vectors is not None
        return index.extended(prepared.vectors, view)
    assert isinstance(index, CodeIndex) and isinstance(prepared.retriever, CodeRetriever)
    return index.extended(prepared.retriever.table, view)


def _encoded(encoder: TextEncoder | ItemVectors, items: pa.Table, columns: Sequence[str]) -> np.ndarray:
    if isinstance(encoder, ItemVectors):
        return encoder.vectors_of(items.column(ITEM).to_pylist())
    return encoder.encode(item_text(items, columns))


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    try:
        return pa.array(values, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
        raise DataError(f"attribute {field.name!r}: expected {field.type}: {error}") from None
