# SPDX-License-Identifier: Apache-2.0
"""The rows of one entity as bytes, column by column, so that the rows of many entities are decoded together without a loop over rows.

A value begins with uint32 numbers: how many rows, then the bytes of each buffer; the buffers follow. A column is a list of buffers,
which depends on its type only: one byte of validity per row if it is nullable; then, of a number or a time, eight bytes per row; of
a string, uint32 lengths and the text; of a list, uint32 lengths and the buffers of its elements. Null rows hold zeros, so equal rows
give equal bytes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from feature_store.online.base import FeatureStoreError


def pack(rows: pa.Table, offsets: np.ndarray) -> Iterator[bytes]:
    """One value for each entity.

    Args:
        rows: the rows of E entities, one entity after another; columns that are not nullable hold no null.
        offsets: int64 ``[E + 1]``: where each entity's rows begin.
    """
    buffers: list[tuple[bytes, list[int]]] = []
    for field, column in zip(rows.schema, rows.columns, strict=True):
        buffers += _buffers(column.combine_chunks(), offsets, field.nullable)
    for entity, count in enumerate(np.diff(offsets).tolist()):
        parts = [content[bounds[entity] : bounds[entity + 1]] for content, bounds in buffers]
        yield np.array([count, *map(len, parts)], np.uint32).tobytes() + b"".join(parts)


def unpack(values: Sequence[bytes], schema: pa.Schema) -> tuple[pa.Table, np.ndarray]:
    """The rows of the entities, one entity after another, and int64 ``[E + 1]`` offsets of where each entity's begin.

    Raises:
        FeatureStoreError: a value does not have the layout of ``schema``.
    """
    width = 1 + sum(_buffer_count(field.type, field.nullable) for field in schema)
    head_bytes = b"".join([value[: 4 * width] for value in values])
    if len(head_bytes) != 4 * width * len(values):
        raise _damaged(schema)
    heads = np.frombuffer(head_bytes, np.uint32).reshape(-1, width).astype(np.int64)
    ends = 4 * width + np.cumsum(heads[:, 1:], axis=1)
    if ends[:, -1].tolist() != [len(value) for value in values]:
        raise _damaged(schema)
    starts = ends - heads[:, 1:]
    contents = (
        b"".join([value[start:stop] for value, start, stop in zip(values, starts[:, b].tolist(), ends[:, b].tolist(), strict=True)])
        for b in range(width - 1)
    )
    count = int(heads[:, 0].sum())
    try:
        columns = [_read(field.type, count, contents, field.nullable) for field in schema]
    except (ValueError, pa.ArrowInvalid):
        raise _damaged(schema) from None
    return pa.table(columns, schema=schema), np.concatenate([[0], np.cumsum(heads[:, 0])])


def _buffers(column: pa.Array, offsets: np.ndarray, nullable: bool = True) -> list[tuple[bytes, list[int]]]:
    """The buffers of a column over all entities, each with the bytes at which the entities' parts begin."""
    buffers = [(np.asarray(column.is_valid()).tobytes(), offsets.tolist())] if nullable else []
    if not _has_lengths(column.type):
        values = np.asarray((column if pt.is_floating(column.type) else column.cast(pa.int64())).fill_null(0))
        return [*buffers, (values.tobytes(), (8 * offsets).tolist())]
    lengths = np.asarray((pc.binary_length(column) if pt.is_string(column.type) else column.value_lengths()).fill_null(0), np.int64)
    inner = np.concatenate([[0], np.cumsum(lengths)])[offsets]
    buffers.append((lengths.astype(np.uint32).tobytes(), (4 * offsets).tolist()))
    if pt.is_string(column.type):
        return [*buffers, ("".join(column.fill_null("").to_pylist()).encode(), inner.tolist())]
    return buffers + _buffers(column.flatten(), inner)


def _read(kind: pa.DataType, count: int, contents: Iterator[bytes], nullable: bool = True) -> pa.Array:
    """A column of ``count`` rows from the next buffers."""
    valid = np.frombuffer(next(contents), np.uint8) != 0 if nullable else np.ones(count, bool)
    _expect(len(valid) == count)
    if not _has_lengths(kind):
        values = np.frombuffer(next(contents), np.float64 if pt.is_floating(kind) else np.int64)
        _expect(len(values) == count)
        return pa.array(values, mask=~valid if nullable else None).cast(kind)
    lengths = np.frombuffer(next(contents), np.uint32)
    _expect(len(lengths) == count)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    _expect(offsets[-1] <= np.iinfo(np.int32).max)
    if pt.is_string(kind):
        content = next(contents)
        _expect(len(content) == offsets[-1])
        bitmap = pa.py_buffer(np.packbits(valid, bitorder="little"))
        return pa.StringArray.from_buffers(count, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(content), bitmap)
    elements = _read(kind.value_type, int(offsets[-1]), contents)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), elements, mask=pa.array(~valid))


def _has_lengths(kind: pa.DataType) -> bool:
    return bool(pt.is_string(kind) or pt.is_list(kind))


def _buffer_count(kind: pa.DataType, nullable: bool = True) -> int:
    if pt.is_list(kind):
        return 1 + nullable + _buffer_count(kind.value_type)
    return (2 if pt.is_string(kind) else 1) + nullable


def _expect(condition: bool) -> None:
    if not condition:
        raise ValueError


def _damaged(schema: pa.Schema) -> FeatureStoreError:
    return FeatureStoreError(f"a stored value does not hold the columns {', '.join(schema.names)}; materialise the features again")
