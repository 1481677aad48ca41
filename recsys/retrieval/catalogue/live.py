# SPDX-License-Identifier: Apache-2.0
"""The catalogue: the one owner of item ids, of their rows, and of which items may be recommended now."""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core.errors import BundleError, DataError
from recsys.core.files import write_bytes

Ids: TypeAlias = pa.Array | pa.ChunkedArray | Sequence[str]

_SCHEMA = pa.schema([pa.field("item_id", pa.string(), nullable=False), pa.field("live", pa.bool_(), nullable=False)])


class Version(NamedTuple):
    """Which content a catalogue has: ``number`` grows with every change, ``digest`` is the SHA-256 of ids and live bits."""

    number: int
    digest: str


@dataclass(frozen=True, eq=False)
class CatalogueView:
    """The catalogue at one moment. Nothing in it ever changes.

    Attributes:
        ids: string ``[N]``, the id of each row.
        live: bool ``[N]``, the rows that may be recommended.
        bitmap: uint8 ``[ceil(N / 8)]``, ``live`` packed with the least significant bit first, as a FAISS ``IDSelectorBitmap`` reads it.
        version: number and digest.
        ids_digest: SHA-256 of the ids in the order of their rows; two views with the same one mean the same items by the same rows.
    """

    ids: pa.StringArray
    live: np.ndarray
    bitmap: np.ndarray
    version: Version
    ids_digest: str
    # Shared with later views, which only ever add to it; rows from ``count`` on belong to those.
    _row_of: dict[str, int] = field(repr=False)

    @property
    def count(self) -> int:
        """N, live or not."""
        return len(self.ids)

    @cached_property
    def live_count(self) -> int:
        """The number of live items."""
        return int(np.count_nonzero(self.live))

    def rows(self, ids: Ids) -> np.ndarray:
        """int64 ``[len(ids)]``: the row of each id; -1 for an id that is not in the catalogue, and for null."""
        encoded = _strings(ids).dictionary_encode(null_encoding="mask")
        distinct = encoded.dictionary.to_pylist()
        # One place more, at the end, for nulls: their index of -1 finds it.
        rows = np.full(len(distinct) + 1, -1, np.int64)
        rows[:-1] = [self._row_of.get(item, -1) for item in distinct]
        rows[rows >= self.count] = -1
        found: np.ndarray = rows[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
        return found

    def take(self, rows: np.ndarray) -> pa.StringArray:
        """string ``[len(rows)]``: the id of each row; null for the row -1.

        Raises:
            DataError: a row is below -1, or not below N.
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < -1 or rows.max() >= self.count):
            wrong = rows[(rows < -1) | (rows >= self.count)][0]
            raise DataError(f"rows: {wrong} is not a row of this catalogue: expected -1 to {self.count - 1}")
        return self.ids.take(pa.array(rows, mask=rows < 0))


class Catalogue:
    """Item ids, their stable rows, live bits and the version.

    A row, once given, is an item's for ever: new items are appended, retired ones stay with their live bit off. Any number of threads
    may read while another writes: a write builds a new `CatalogueView` aside and then replaces the present one in a single step.
    Where several answers must agree with each other, take one `snapshot` and ask that.

    Args:
        ids: the first items, all live.

    Raises:
        DataError: an id is null or stands there twice.
    """

    def __init__(self, ids: Ids = ()) -> None:
        self._writing = threading.Lock()
        self._id_lengths = hashlib.sha256()
        self._id_bytes = hashlib.sha256()
        self._row_of: dict[str, int] = {}
        self._append(_strings(ids), 0)
        self._publish(_strings(ids), np.ones(len(self._row_of), bool), 1)

    def snapshot(self) -> CatalogueView:
        """The catalogue as it is now, immutable."""
        return self._view

    @property
    def version(self) -> Version:
        """The present version."""
        return self._view.version

    def rows(self, ids: Ids) -> np.ndarray:
        """int64 ``[len(ids)]``: the row of each id; -1 for an id that is not in the catalogue, and for null."""
        return self._view.rows(ids)

    def ids(self, rows: np.ndarray) -> pa.StringArray:
        """string ``[len(rows)]``: the id of each row; null for the row -1. See `CatalogueView.take`."""
        return self._view.take(rows)

    def add(self, ids: Ids) -> None:
        """Append items, all live.

        Raises:
            DataError: an id is null, stands there twice, or is in the catalogue already. Nothing is added then.
        """
        new = _strings(ids)
        with self._writing:
            view = self._view
            if len(new):
                everything = pa.concat_arrays([view.ids, new])
                self._append(new, view.count)
                self._publish(everything, np.append(view.live, np.ones(len(new), bool)), view.version.number + 1)

    def set_live(self, ids: Ids, live: bool) -> None:
        """Let items be recommended, or no longer. The version changes only where a bit does.

        Raises:
            DataError: an id is not in the catalogue. No bit is changed then.
        """
        values = _strings(ids)
        with self._writing:
            view = self._view
            rows = view.rows(values)
            if (rows < 0).any():
                raise DataError(f"set_live: not in the catalogue: {_some(values.filter(pa.array(rows < 0)))}")
            bits = view.live.copy()
            bits[rows] = live
            if not np.array_equal(bits, view.live):
                self._publish(view.ids, bits, view.version.number + 1)

    def copy(self) -> "Catalogue":
        """Another catalogue of the same rows, live bits and version, which changes apart from this one."""
        view, other = self._view, Catalogue(self._view.ids)
        other._publish(view.ids, view.live.copy(), view.version.number)
        return other

    def save(self, path: Path) -> None:
        """Write an Arrow IPC file, whole or not at all: ``item_id``, ``live``, and the version in the schema's metadata."""
        view = self._view
        metadata = {"version": str(view.version.number), "digest": view.version.digest}
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, _SCHEMA.with_metadata(metadata)) as writer:
            writer.write_batch(pa.record_batch([view.ids, pa.array(view.live)], schema=_SCHEMA))
        write_bytes(path, sink.getvalue())

    @classmethod
    def load(cls, path: Path, *, mmap: bool = False) -> "Catalogue":
        """Read what `save` wrote, or map its ids; rows, live bits and version are as they were.

        Raises:
            BundleError: the file is absent, is not a catalogue, or its content does not have the digest that it names.
        """
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path)) if mmap else pa.BufferReader(path.read_bytes())).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            raise BundleError(f"{path}: cannot read the catalogue: {error}") from None
        stored = table.schema.metadata or {}
        if not table.schema.equals(_SCHEMA) or not {b"version", b"digest"} <= stored.keys():
            raise BundleError(f"{path}: expected the columns {', '.join(map(str, _SCHEMA))} and a version, got {table.schema}")
        try:
            catalogue = cls(table["item_id"])
            catalogue._publish(catalogue._view.ids, table["live"].to_numpy().astype(bool), int(stored[b"version"]))
        except (DataError, ValueError) as error:
            raise BundleError(f"{path}: not a catalogue: {error}") from None
        if catalogue.version.digest != stored[b"digest"].decode():
            raise BundleError(f"{path}: the content's digest is {catalogue.version.digest}, expected {stored[b'digest'].decode()}")
        return catalogue

    def _append(self, new: pa.StringArray, first: int) -> None:
        """Give the rows from ``first`` on to ``new`` ids, once they are known to be new."""
        if new.null_count:
            raise DataError(f"ids: expected no null, got {new.null_count}")
        counts = pc.value_counts(new)
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        if len(twice):
            raise DataError(f"ids: given twice: {_some(twice)}")
        known = [item for item in new.to_pylist() if item in self._row_of]
        if known:
            raise DataError(f"ids: in the catalogue already: {_some(pa.array(known))}")
        self._row_of.update(zip(new.to_pylist(), range(first, first + len(new)), strict=True))
        # Lengths and bytes apart, so that no two lists of ids read alike, and that appending only updates.
        self._id_lengths.update(pc.binary_length(new).to_numpy(zero_copy_only=False).astype("<i8"))
        self._id_bytes.update("".join(new.to_pylist()).encode())

    def _publish(self, ids: pa.StringArray, live: np.ndarray, number: int) -> None:
        bitmap = np.packbits(live, bitorder="little")
        live.flags.writeable = bitmap.flags.writeable = False
        ids_digest = hashlib.sha256(self._id_lengths.digest() + self._id_bytes.digest()).hexdigest()
        digest = hashlib.sha256(ids_digest.encode() + bitmap.tobytes()).hexdigest()
        self._view = CatalogueView(ids, live, bitmap, Version(number, digest), ids_digest, self._row_of)


def _strings(ids: Ids) -> pa.StringArray:
    """``ids`` as one Arrow array of strings."""
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if isinstance(ids, str):
        raise DataError(f"ids: expected a list of strings, got the string {ids!r}")
    if not isinstance(ids, pa.Array):
        try:
            return pa.array(ids, pa.string())
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"ids: expected strings: {error}") from None
    if pa.types.is_string(ids.type):
        return ids
    value_type = ids.type.value_type if pa.types.is_dictionary(ids.type) else ids.type
    if pa.types.is_null(value_type) or pa.types.is_string(value_type) or pa.types.is_large_string(value_type):
        return ids.cast(pa.string())
    raise DataError(f"ids: expected strings, got {ids.type}")


def _some(ids: pa.Array, at_most: int = 5) -> str:
    """The first few ids, for an error's message."""
    more = f" and {len(ids) - at_most} more" if len(ids) > at_most else ""
    return ", ".join(map(repr, ids[:at_most].to_pylist())) + more
