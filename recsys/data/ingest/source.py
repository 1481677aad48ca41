# SPDX-License-Identifier: Apache-2.0
"""Reading a user's Parquet or CSV files, and the errors that name file, column, row and value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset

from recsys.core.delta import is_delta
from recsys.core.errors import DataError, SchemaError, unknown
from recsys.data.frames import from_arrow

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class RawTable:
    """The columns of a source, as they are.

    Attributes:
        file: what to call the source in errors and in the report.
        frame: its columns.
        first: the place of the first row in the source, counted from 0: more than 0 where the source is read in pieces.
    """

    file: str
    frame: pl.DataFrame
    first: int = 0

    @property
    def rows(self) -> pl.Series:
        """The place of each row in the source."""
        return pl.int_range(self.first, self.first + self.frame.height, dtype=pl.Int64, eager=True)

    def column(self, role: str, name: str) -> "RawColumn":
        """The source column ``name``, wanted for ``role`` (such as ``interactions.user_id``).

        Raises:
            SchemaError: there is no such column.
        """
        require(self.file, {role: name}, self.frame.columns)
        values = self.frame.get_column(name)
        if isinstance(values.dtype, pl.Categorical | pl.Enum):
            values = values.cast(pl.String)
        return RawColumn(self.file, role, name, values, self.rows)


@dataclass(frozen=True)
class RawColumn:
    """Values of a source column, each with its row (the elements of a list share theirs)."""

    file: str
    role: str
    name: str
    values: pl.Series
    rows: pl.Series

    def refuse_where(self, bad: pl.Series, expected: str) -> None:
        """Raise a `SchemaError` for the first row where ``bad`` holds; null does not hold."""
        found = bad.fill_null(False).arg_true()
        if len(found):
            first = self.values.slice(found[0], 1)
            value = first.dt.to_string("iso")[0] if first.dtype.is_temporal() else repr(first[0])
            where = f"{self.role}: column {self.name!r}, row {self.rows[found[0]]} (counted from 0)"
            raise SchemaError(f"{self.file}: {where}: expected {expected}, got {value}")

    def refuse_type(self, expected: str) -> NoReturn:
        """Raise a `SchemaError` for the type of the whole column."""
        raise SchemaError(f"{self.file}: {self.role}: column {self.name!r}: expected {expected}, got a column of type {self.values.dtype}")

    def with_values(self, values: pl.Series, rows: pl.Series | None = None) -> "RawColumn":
        """Other values of the same origin."""
        return RawColumn(self.file, self.role, self.name, values, self.rows if rows is None else rows)


def read_table(path: Path, roles: Mapping[str, str]) -> RawTable:
    """Read some columns of a Parquet file, a folder of Parquet files, a CSV or a TSV file.

    Every CSV value is read as text, so that an id such as ``007`` stays what it is; an empty one is null.

    Args:
        path: the source.
        roles: the wanted columns by their roles (such as ``interactions.user_id``).

    Raises:
        DataError: the file is absent, of an unknown format, or damaged, or a Delta table.
        SchemaError: a column is absent.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file")
    refuse_delta(path)
    try:
        if path.is_dir() or path.suffix.lower() in _PARQUET:
            return RawTable(str(path), _read_parquet(path, roles))
        if path.suffix.lower() in _SEPARATORS:
            return RawTable(str(path), _read_csv(path, roles, _SEPARATORS[path.suffix.lower()]))
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    raise DataError(f"{path}: unknown format: expected a name with {', '.join((*_PARQUET, *_SEPARATORS))}, or a folder of Parquet files")


def refuse_delta(path: Path) -> None:
    """Raise a `DataError` where a source is a Delta table: its files, read as a folder, would hold what was replaced or never committed."""
    if is_delta(path):
        raise DataError(
            f"{path} is a Delta table, whose rows have no order of arrival: expected files; a recipe reads it as {{name: delta}}"
        )


def _read_parquet(path: Path, roles: Mapping[str, str]) -> pl.DataFrame:
    source = pa.dataset.dataset(path, format="parquet")
    require(str(path), roles, source.schema.names)
    return from_arrow(source.to_table(columns=_unique(roles)))


def _read_csv(path: Path, roles: Mapping[str, str], separator: str) -> pl.DataFrame:
    # A line break inside quotes is only understood where the reader is told to expect it.
    parse = pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    with pa.csv.open_csv(path, parse_options=parse) as reader:
        names = reader.schema.names
    require(str(path), roles, names)
    wanted = _unique(roles)
    convert = pa.csv.ConvertOptions(
        include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), null_values=[""], strings_can_be_null=True
    )
    return from_arrow(pa.csv.read_csv(path, parse_options=parse, convert_options=convert))


def _unique(roles: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(roles.values()))


def require(file: str, roles: Mapping[str, str], names: Sequence[str]) -> None:
    """Raise a `SchemaError` where a column that has a role is not among the source's columns, or is there twice."""
    for role, name in roles.items():
        if name not in names:
            raise SchemaError(f"{file}: {role}: {unknown('column', name, names)}")
        if names.count(name) > 1:
            raise SchemaError(f"{file}: {role}: column {name!r} occurs twice in the header")
