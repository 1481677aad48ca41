# SPDX-License-Identifier: Apache-2.0
"""What an item's text is, what encodes it, and the cache of what was encoded."""

import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys.core.components import component_config
from recsys.core.config import Config
from recsys.core.errors import SchemaError, unknown
from recsys.core.schema import ITEM

Vectors = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]


class TextEncoder(Protocol):
    """A frozen map from texts to vectors. Components of kind ``text_encoder`` are built as ``cls(config)``."""

    @property
    def identity(self) -> str:
        """A name that changes whenever the vectors would: the model, its version, its settings."""
        ...

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """float32 ``[N, D]``, row i for text i; ``progress(done, total)`` is called as texts are done."""
        ...


class ItemVectors(ABC):
    """What knows items by their ids and not by their text. Also of kind ``text_encoder``."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """See `TextEncoder.identity`."""

    @abstractmethod
    def vectors_of(self, ids: Sequence[str]) -> Vectors:
        """float32 ``[N, D]``: the vector of each item."""


class ItemText(Config):
    """Item text and its encoder.

    Attributes:
        encoder: a text encoder.
        columns: the item columns that make the text, in this order; none for an encoder that knows items by their ids.
    """

    encoder: component_config("text_encoder")  # type: ignore[valid-type]
    columns: tuple[str, ...] = ()


def item_vectors(encoder: TextEncoder | ItemVectors, items: pa.Table, columns: Sequence[str], cache_dir: Path) -> Vectors:
    """float32 ``[N, D]``: the vectors of a catalogue's items, by their ids or by the text in these columns; texts are cached.

    Raises:
        SchemaError: a column is absent.
    """
    if isinstance(encoder, ItemVectors):
        return encoder.vectors_of(items.column(ITEM).to_pylist())
    return encode_cached(encoder, item_text(items, columns), cache_dir)


def encode_cached(encoder: TextEncoder, texts: Sequence[str], cache_dir: Path, progress: Progress | None = None) -> Vectors:
    """The vectors of ``texts``, read from ``cache_dir`` where the same encoder has already encoded the same texts.

    The file is named by the sha256 of the encoder's identity and the texts. A file that is damaged is written anew.
    """
    path = cache_dir / f"{_digest(encoder.identity, texts)}.npy"
    try:
        vectors: Vectors = np.load(path, allow_pickle=False)
        if vectors.dtype == np.float32 and vectors.ndim == 2 and len(vectors) == len(texts):
            return vectors
    except (FileNotFoundError, ValueError, EOFError):
        pass
    vectors = encoder.encode(texts, progress)
    cache_dir.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=cache_dir, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, vectors, allow_pickle=False)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return vectors


def item_text(items: pa.Table, columns: Sequence[str]) -> list[str]:
    """One text for each item: the values of ``columns`` joined by a full stop, such as ``Heat. Action, Crime. 1995``.

    Lists are joined by commas, whole numbers lose their decimals, nulls and empty values are left out. An item without any value has
    the empty text.

    Raises:
        SchemaError: a column is absent.
    """
    for column in columns:
        if column not in items.column_names:
            raise SchemaError(f"item_text: {unknown('column', column, items.column_names)}")
    values = [[_words(value) for value in items.column(column).to_pylist()] for column in columns]
    return [". ".join(filter(None, row)) for row in zip(*values, strict=True)] if columns else [""] * items.num_rows


def _words(value: Any) -> str:
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_words, value)))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, date | datetime):
        return value.isoformat()
    return " ".join(str(value).split()).rstrip(".")


def _digest(identity: str, texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in (identity, *texts):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
