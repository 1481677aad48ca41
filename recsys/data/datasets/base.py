# SPDX-License-Identifier: Apache-2.0
"""What a component of the kind ``dataset`` offers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from recsys.core.components import get
from recsys.core.config import Config
from recsys.data.dataset import Dataset
from recsys.data.ingest.days import DayEvents


class DatasetSource(Protocol):
    """Somewhere a data set comes from. It is built as ``cls(config)`` and registered with ``@register("dataset", name)``."""

    def load(self) -> Dataset:
        """The data set in canonical form."""
        ...


@runtime_checkable
class FromFiles(DatasetSource, Protocol):
    """A source that reads files which may change."""

    def files(self) -> tuple[Path, ...]:
        """The files and folders that `load` reads."""
        ...


@runtime_checkable
class Versioned(DatasetSource, Protocol):
    """A source that reads a version of a table, beside what is in `FromFiles.files`."""

    def snapshot(self) -> dict[str, Any]:
        """Plain values that name the table and the version."""
        ...


@runtime_checkable
class Partitioned(DatasetSource, Protocol):
    """A source whose events come in days."""

    def partitions(self) -> tuple[str, ...]:
        """The days that are there, ``YYYY-MM-DD`` in UTC, ascending."""
        ...

    def day_files(self, day: str) -> tuple[Path, ...]:
        """The files that `load_day` reads."""
        ...

    def entity_files(self) -> tuple[Path, ...]:
        """The files that `join` reads."""
        ...

    def load_day(self, day: str) -> DayEvents:
        """The canonical events of a day."""
        ...

    def join(self, days: Mapping[str, DayEvents]) -> Dataset:
        """One data set of these days, with items and users."""
        ...


def dataset_source(config: Config) -> DatasetSource:
    """The source that a recipe's ``dataset`` section (a ``component_config("dataset")``) asks for.

    Raises:
        ComponentError: no data set has the configuration's ``name``.
    """
    source: DatasetSource = get("dataset", getattr(config, "name", type(config).__qualname__))(config)
    return source


def load_dataset(config: Config) -> Dataset:
    """The data set of a recipe's ``dataset`` section.

    Raises:
        ComponentError: no data set has the configuration's ``name``.
        DataError: the data cannot be had, or breaks a rule.
    """
    return dataset_source(config).load()
