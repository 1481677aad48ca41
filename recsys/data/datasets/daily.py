# SPDX-License-Identifier: Apache-2.0
"""Events that arrive in a folder for each day, ``day=YYYY-MM-DD/*.parquet``, beside files of items and users."""

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Literal

import polars as pl

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import DataError
from recsys.data.dataset import Dataset
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.ingest.days import DayEvents, canonical_day, join_days
from recsys.data.ingest.source import RawTable, read_table

_PREFIX = "day="


@register("dataset", "daily")
class Daily:
    """Reads the folders of days. A day is that of the events' times, in UTC; a file that comes late is put into its day's folder."""

    class Config(BaseConfig):
        """Where the files are.

        Attributes:
            path: the folder of the days' folders; a folder without Parquet files is no day.
            items: a Parquet, CSV or TSV file, or a folder of Parquet files.
            users: likewise, where there are any.
            roles: which column plays which role, the YAML file of ``recsys ingest --schema``.
            first_day: earlier days are left alone.
            last_day: and so are later ones.
        """

        name: Literal["daily"] = "daily"
        path: Path
        items: Path
        users: Path | None = None
        roles: Path
        first_day: date | None = None
        last_day: date | None = None

    def __init__(self, config: Config) -> None:
        self.config = config

    def load(self) -> Dataset:
        """The data set of all days.

        Raises:
            DataError: there is no day, a file cannot be read, or see `recsys.data.ingest.days.join_days`.
            SchemaError: a column is absent, or holds a value that cannot be cast without loss.
        """
        return self.join({day: self.load_day(day) for day in self.partitions()})

    def partitions(self) -> tuple[str, ...]:
        """The days that have files.

        Raises:
            DataError: there is none, or a folder's name is no day.
        """
        folders = sorted(folder for folder in self.config.path.glob(f"{_PREFIX}*") if _parquet(folder))
        first, last = self.config.first_day or date.min, self.config.last_day or date.max
        days = [day for day in map(_day_of, folders) if first <= day <= last]
        if not days:
            raise DataError(f"{self.config.path}: expected folders {_PREFIX}YYYY-MM-DD with Parquet files, found none in the recipe's days")
        return tuple(day.isoformat() for day in days)

    def day_files(self, day: str) -> tuple[Path, ...]:
        """The day's Parquet files and the roles."""
        return (*_parquet(self.config.path / f"{_PREFIX}{day}"), self.config.roles)

    def entity_files(self) -> tuple[Path, ...]:
        """Items, users and roles."""
        return tuple(file for file in (self.config.items, self.config.users, self.config.roles) if file is not None)

    def load_day(self, day: str) -> DayEvents:
        """The canonical events of a day: its files in the order of their names."""
        schema, folder = DatasetSchema.load(self.config.roles), self.config.path / f"{_PREFIX}{day}"
        frames = [read_table(file, schema.interactions.sources).frame for file in _parquet(folder)]
        if not frames:
            raise DataError(f"{folder}: expected Parquet files, found none")
        return canonical_day(schema, day, RawTable(str(folder), pl.concat(frames, how="vertical_relaxed")))

    def join(self, days: Mapping[str, DayEvents]) -> Dataset:
        """The data set of these days; it takes the folder's name."""
        schema, config = DatasetSchema.load(self.config.roles), self.config
        items = read_table(config.items, schema.items.sources)
        users = None if config.users is None else read_table(config.users, schema.users.sources if schema.users else {})
        return join_days(config.path.resolve().name, schema, days, items, users)


def _parquet(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.parquet") if not file.name.startswith((".", "_")))


def _day_of(folder: Path) -> date:
    try:
        return date.fromisoformat(folder.name.removeprefix(_PREFIX))
    except ValueError:
        raise DataError(f"{folder}: expected a name such as {_PREFIX}2024-03-01") from None
