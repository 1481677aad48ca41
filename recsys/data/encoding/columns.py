# SPDX-License-Identifier: Apache-2.0
"""Reading columns of raw values with their status: every Arrow spelling of a type becomes one, and a presence mask stands beside it."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from recsys.core.errors import SchemaError, unknown
from recsys.core.status import ValueStatus, status_column

STRING, NUMBER = pa.large_string(), pa.float64()
_ELEMENT = {STRING: "strings", NUMBER: "numbers"}


@dataclass(frozen=True)
class Scalars:
    """One value per row.

    Attributes:
        values: large_string (or a dictionary of them, where `Columns` was asked for those) or float64 ``[B]``.
        present: bool ``[B]``: the status is PRESENT (where there is a status column) and the value is neither null nor NaN nor infinite.
    """

    values: pa.Array
    present: np.ndarray

    def numbers(self) -> np.ndarray:
        """float64 ``[B]``, arbitrary where not present."""
        return _to_numpy(self.values)


@dataclass(frozen=True)
class Lists:
    """A list per row.

    Attributes:
        elements: large_string (or a dictionary of them, where `Columns` was asked for those) or float64 ``[E]``, of all rows.
        starts: int64 ``[B]``: where a row's elements begin.
        lengths: int64 ``[B]``: how many they are, 0 where the list is not present.
        present: bool ``[B]``: the status is PRESENT (where there is a status column) and the list is not null. It may be empty.
    """

    elements: pa.Array
    starts: np.ndarray
    lengths: np.ndarray
    present: np.ndarray

    def last(self, count: int) -> "Lists":
        """Only the last ``count`` elements of every row."""
        kept = np.minimum(self.lengths, count)
        return Lists(self.elements, self.starts + self.lengths - kept, kept, self.present)

    def where(self, rows: np.ndarray) -> "Lists":
        """Only the lists of the rows where the mask ``rows`` holds; the others become empty."""
        return Lists(self.elements, self.starts, np.where(rows, self.lengths, 0), self.present & rows)

    def flatten(self) -> pa.Array:
        """The elements of the kept ranges, row after row."""
        before = np.cumsum(self.lengths) - self.lengths
        picks = np.repeat(self.starts - before, self.lengths)
        picks += np.arange(len(picks))
        return self.elements.take(pa.array(picks))


class Columns:
    """The columns of a table of features, each with its presence.

    The errors of every method: `SchemaError` where a column is absent (with the nearest name), ambiguous, or of another type.

    Args:
        table: the features.
        dictionaries: leave strings that came as a dictionary as they are.
    """

    def __init__(self, table: pa.Table | pa.RecordBatch, *, dictionaries: bool = False) -> None:
        self._table = table
        self._dictionaries = dictionaries
        self._names = frozenset(table.schema.names)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def strings(self, name: str) -> Scalars:
        """A column of strings."""
        values = self._read(name, STRING)
        return Scalars(values, self._present(name, values))

    def numbers(self, name: str) -> Scalars:
        """A column of integers, floats or booleans, as float64."""
        values = self._read(name, NUMBER)
        present = self._present(name, values)
        return Scalars(values, present & np.isfinite(_to_numpy(values)))

    def string_lists(self, name: str) -> Lists:
        """A column of lists of strings."""
        return self._lists(name, STRING)

    def number_lists(self, name: str) -> Lists:
        """A column of lists of integers, floats or booleans, as float64."""
        return self._lists(name, NUMBER)

    def _lists(self, name: str, element: pa.DataType) -> Lists:
        column = self._read(name, pa.large_list(element))
        present = self._present(name, column)
        offsets = column.offsets.to_numpy().astype(np.int64, copy=False)
        # A list that is null or not PRESENT may still span elements: its length is set to 0 here, once.
        return Lists(column.values, offsets[:-1], np.where(present, np.diff(offsets), 0), present)

    def _present(self, name: str, values: pa.Array) -> np.ndarray:
        valid: np.ndarray = values.is_valid().to_numpy(zero_copy_only=False) if values.null_count else np.ones(len(values), dtype=bool)
        status_name = status_column(name)
        if status_name not in self:
            return valid
        status = _contiguous(self._table.column(status_name))
        if not pt.is_integer(status.type):
            raise SchemaError(f"column {status_name!r}: expected integers (a ValueStatus each), got {status.type}")
        codes: np.ndarray = status.fill_null(ValueStatus.MISSING).to_numpy(zero_copy_only=False)
        return np.asarray(valid & (codes == ValueStatus.PRESENT))

    def _read(self, name: str, target: pa.DataType) -> pa.Array:
        if name not in self:
            raise SchemaError(f"missing column: {unknown('column', name, self._names)}")
        if self._table.schema.get_field_index(name) < 0:
            raise SchemaError(f"column {name!r}: expected once, but the table has several of this name")
        column = _contiguous(self._table.column(name))
        if not _readable(column.type, target):
            kind = f"lists of {_ELEMENT[target.value_type]}" if pt.is_large_list(target) else _ELEMENT[target]
            raise SchemaError(f"column {name!r}: expected {kind}, got {column.type}")
        if column.type == target or (self._dictionaries and _is_dictionary(column.type)):
            return column
        return column.cast(target, safe=False)


def _is_dictionary(given: pa.DataType) -> bool:
    """Whether a column is a dictionary, or lists of values of one."""
    return bool(pt.is_dictionary(given.value_type if pt.is_list(given) or pt.is_large_list(given) else given))


def _contiguous(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _to_numpy(values: pa.Array) -> np.ndarray:
    filled = values.fill_null(np.nan) if values.null_count else values
    numbers: np.ndarray = filled.to_numpy(zero_copy_only=False)
    return numbers


def _readable(given: pa.DataType, target: pa.DataType) -> bool:
    """Whether a column of type ``given`` can stand for ``target``. A column of nulls can stand for any."""
    if pt.is_null(given):
        return True
    if pt.is_large_list(target):
        # Not list_view: pyarrow 25 casts it to lists without their elements.
        is_list = pt.is_list(given) or pt.is_large_list(given) or pt.is_fixed_size_list(given)
        return bool(is_list) and _readable(given.value_type, target.value_type)
    if target == STRING:
        if pt.is_dictionary(given):
            given = given.value_type
            return bool(pt.is_string(given) or pt.is_large_string(given))
        return bool(pt.is_string(given) or pt.is_large_string(given) or pt.is_string_view(given))
    return bool(pt.is_integer(given) or pt.is_floating(given) or pt.is_boolean(given))
